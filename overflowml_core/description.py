"""Describes models and profiles their passes, from whatever they are given as, and keeps what was found. Decides nothing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from overflowml_core import environment, sources
from overflowml_core.errors import NotAModel, PluginFault
from overflowml_core.facts import Component, Network, Workload
from overflowml_core.inspect.profile_cache import ProfileCache, content_key, folder_key
from overflowml_core.registry import plugins
from overflowml_core.units import format_bytes

_CONFIG_ONLY = " (config only)"
"""Behind the source of a network whose weights nobody has seen; the hosts' descriptions put it there."""

_WHERE_FROM = "_name_or_path"
"""Key of both hosts' configurations that says where they were read, and nothing of the model."""

_TRACED = "traced"
"""What an activation's source is where the model's own code told it."""

_log = logging.getLogger("overflowml")


def describe(source: object, workload: Workload | None = None, options: dict[str, object] | None = None, fresh: bool = False) -> Network:
    """What a model consists of, and what its passes compute and hold at a workload; no weight is read.

    Args:
        source: a folder, a Hub id ("owner/name"), a .gguf or .safetensors file, a size ("40GB"), a live module or a live pipeline.
        workload: what it is profiled for.
        options: what the host's ``from_pretrained`` would be given besides the source.
        fresh: profile it again, whatever the cache holds.

    Raises:
        NotAModel: no plugin knows the source.
        BadCheckpoint: its files are broken.
        BadSize: it is a size that cannot be read.
    """
    wanted, asked = workload or Workload(), dict(options or {})
    found = sources.of_text(source, wanted, environment.cache_folder()) if isinstance(source, (str, os.PathLike, int, float)) else None
    if isinstance(found, Network):
        return found
    if found is not None:
        return _describe_folder(found, wanted, asked, fresh)
    return _describe_live(source, wanted, asked, fresh)


def _describe_folder(place: sources.Place, workload: Workload, options: dict[str, object], fresh: bool) -> Network:
    key = folder_key(place.folder, workload, {**options, "dtypes": repr(sorted(place.dtypes.items()))})
    cache = _profiles()
    network = cache.get(key) if key is not None and not fresh else None
    if network is None:
        network = _described(place.folder, workload, {**_dtype_options(place), **options})
        measured = _measured(place.folder, network, workload, {**_dtype_options(place), **options})
        if measured is not None:
            network = measured
            if key is not None:
                cache.put(key, network)
    if place.weight_bytes is not None and abs(network.weight_bytes - place.weight_bytes) * 50 > place.weight_bytes:
        _log.warning(
            "%s: its files hold %s of weights, the model that its configuration describes %s; planned for the latter",
            place.name,
            format_bytes(place.weight_bytes),
            format_bytes(network.weight_bytes),
        )
    return replace(network, source=_source_name(place, network.source))


def _source_name(place: sources.Place, described: str) -> str:
    """What people call the source. A kept network was described from another folder with the same contents, perhaps."""
    suffix = _CONFIG_ONLY if described.endswith(_CONFIG_ONLY) else ""
    return place.name or f"{place.folder}{suffix}"


def _dtype_options(place: sources.Place) -> dict[str, object]:
    """The dtypes of a place as a host takes them."""
    if not place.dtypes:
        return {}
    import torch

    dtypes = {name: getattr(torch, dtype) for name, dtype in place.dtypes.items()}
    return {"torch_dtype": dtypes["model"] if set(dtypes) == {"model"} else dtypes}


def _describe_live(source: object, workload: Workload, options: dict[str, object], fresh: bool) -> Network:
    network = plugins().describe(source, workload, options)
    if network is None:
        raise NotAModel(f"a {type(source).__name__}", "give a diffusers pipeline or transformers folder, or a live module or pipeline")
    # Facts of a live model are cheap and may have changed; its profile depends on them and on its configuration.
    parts = plugins().components(source) or {}
    configs = {name: _config_of(part) for name, part in {"": source, **parts}.items()}
    if any(text is None for name, text in configs.items() if name):
        return _measured(source, network, workload, options) or network
    key = content_key(["live", network.class_name, network.fingerprint, configs], workload)
    cache = _profiles()
    known = cache.get(key) if not fresh else None
    if known is not None and len(known.components) == len(network.components):
        return replace(network, components=tuple(map(_with_profile, network.components, known.components)))
    measured = _measured(source, network, workload, options)
    if measured is None:
        return network
    # Hooks that keep a trace from a managed or offloaded model are not in the key: estimates are for now alone, not for its like.
    if all(component.activation_source == _TRACED for component in measured.components) or not _is_wrapped((source, *parts.values())):
        cache.put(key, measured)
    return measured


def _is_wrapped(parts: Iterable[object]) -> bool:
    """Whether hooks or wrappers sit on a module anywhere in the parts."""
    for part in parts:
        for module in part.modules() if hasattr(part, "modules") else ():
            own = vars(module)
            if "forward" in own or own.get("_forward_pre_hooks") or own.get("_forward_hooks"):
                return True
    return False


def _with_profile(component: Component, known: Component) -> Component:
    return replace(
        component,
        passes=known.passes,
        activation_bytes=known.activation_bytes,
        activation_source=known.activation_source,
        profiles=known.profiles,
        variants=known.variants,
    )


def describe_moe(
    total_b: float, active_b: float, experts: int, per_token: int, nbytes: int | None = None, workload: Workload | None = None
) -> Network:
    """A mixture of experts that is known by four numbers; see :func:`overflowml_core.bare.moe_network`."""
    from overflowml_core.bare import moe_network

    return moe_network(total_b, active_b, experts, per_token, nbytes, workload)


def _config_of(part: object) -> str | None:
    """A component's configuration as text, as both hosts' configurations write themselves; None where it has none."""
    config = getattr(part, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        config = to_dict()
    return json.dumps(_without_origin(config), sort_keys=True, default=str) if isinstance(config, Mapping) else None


def _without_origin(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _without_origin(item) for key, item in value.items() if key != _WHERE_FROM}
    if isinstance(value, (list, tuple)):
        return [_without_origin(item) for item in value]
    return value


def _described(folder: Path, workload: Workload, options: dict[str, object]) -> Network:
    network = plugins().describe(folder, workload, options)
    if network is None:
        raise NotAModel(folder, "give a diffusers pipeline or transformers folder, or a live module or pipeline")
    return network


def _measured(source: object, network: Network, workload: Workload, options: dict[str, object]) -> Network | None:
    """The network with its profile; None where nobody can make one. A profile that fails is no reason not to load a model."""
    try:
        return plugins().measure(source, network, workload, options)
    except PluginFault as fault:
        _log.warning("%s has no profile (%s); what its description says of activations is planned with", network.class_name, fault)
        return None


def _profiles() -> ProfileCache:
    return ProfileCache(environment.cache_folder() / "profiles")


def local_folder(source: object) -> Path | None:
    """The folder that a host is asked to load, None where it is to be found elsewhere (a Hub repository, ``owner/name``).

    Raises:
        NotAModel: it can only be a path, and leads to no folder.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(os.fspath(source))
    if path.is_dir():
        return path
    # A host would look for it on the Hub, and complain of the name that it is not.
    if not isinstance(source, str) or path.is_file() or path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2:
        sources.check_path(path)
    return None
