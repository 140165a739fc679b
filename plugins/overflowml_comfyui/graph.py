"""Reads a prompt of the host: which files its samplers use, at which sizes. Pure; takes any JSON and answers with what it understands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LOADERS: dict[str, tuple[tuple[str, str], ...]] = {
    "UNETLoader": (("unet_name", "diffusion_models"),),
    "CheckpointLoaderSimple": (("ckpt_name", "checkpoints"),),
    "ImageOnlyCheckpointLoader": (("ckpt_name", "checkpoints"),),
    "CLIPLoader": (("clip_name", "text_encoders"),),
    "DualCLIPLoader": (("clip_name1", "text_encoders"), ("clip_name2", "text_encoders")),
    "TripleCLIPLoader": tuple((f"clip_name{i}", "text_encoders") for i in (1, 2, 3)),
    "VAELoader": (("vae_name", "vae"),),
}
"""The host's own loaders, each with the inputs that name files and the folder kinds where these lie (ComfyUI 0.33, nodes.py)."""

OPTIMIZE = "OverflowMLOptimize"
QUANTIZE = "OverflowMLLoadAndQuantize"
"""Our own loader. Its file names the folder kind, too, and what is asked of it stands in its own fields."""

_QUANTIZE_FIELDS = ("budget", "reserve", "format", "quality")

_MODEL_INPUTS = ("model", "guider")
_SIZE_INPUTS = {"width": "width", "height": "height", "length": "frames", "batch_size": "batch"}
_MOST_STEPS_BACK = 200


@dataclass(frozen=True, slots=True)
class Load:
    """A file that a loader of the graph reads: the node, the folder kind, the file's name in it, and what is asked of it."""

    node: str
    folder: str
    file: str
    fields: Mapping[str, object] = field(default_factory=dict)


def loads_of(prompt: object) -> tuple[Load, ...]:
    """The files that a prompt reads, each with the sizes at which it is used and the budget that an Optimize node gives it.

    What samplers reach is sized by them; other loaders (text encoders, a VAE) have the first sampler's sizes.

    Args:
        prompt: node ids with ``class_type`` and ``inputs``, as the host queues it; anything else gives no files.
    """
    if not isinstance(prompt, Mapping):
        return ()
    nodes = {str(name): node for name, node in prompt.items() if isinstance(node, Mapping) and isinstance(node.get("inputs"), Mapping)}
    sized: dict[str, dict[str, object]] = {}
    first: dict[str, object] = {}
    for name, node in nodes.items():
        start = next((source for key in _MODEL_INPUTS if (source := _link(node["inputs"].get(key))) is not None), None)
        if start is None or "latent_image" not in node["inputs"]:
            continue
        sizes = _sizes(nodes, name)
        first = first or sizes
        path = list(_upstream(nodes, start, _MODEL_INPUTS))
        for reached in path:
            if str(nodes[reached].get("class_type")) in (*LOADERS, QUANTIZE):
                sized.setdefault(reached, {**sizes, **_asked(nodes, path)})
    ours = [
        Load(name, *_split(node["inputs"]["file"]), {**sized.get(name, first), **_own(node["inputs"])})
        for name, node in nodes.items()
        if node.get("class_type") == QUANTIZE and isinstance(node["inputs"].get("file"), str)
    ]
    return (*ours, *_host_loads(nodes, sized, first))


def _host_loads(
    nodes: Mapping[str, Mapping[str, Any]], sized: Mapping[str, dict[str, object]], first: dict[str, object]
) -> tuple[Load, ...]:
    return tuple(
        Load(name, folder, node["inputs"][key], sized.get(name, first))
        for name, node in nodes.items()
        for key, folder in LOADERS.get(str(node.get("class_type")), ())
        if isinstance(node["inputs"].get(key), str)
    )


def _split(label: str) -> tuple[str, str]:
    folder, _, name = label.partition("/")
    return folder, name


def _own(inputs: Mapping[str, object]) -> dict[str, object]:
    return {key: inputs[key] for key in _QUANTIZE_FIELDS if isinstance(inputs.get(key), str)}


def _link(value: object) -> str | None:
    """The node that an input is connected to, None where it holds a value."""
    return str(value[0]) if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], (str, int)) else None


def _upstream(nodes: Mapping[str, Mapping[str, object]], start: str, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """Nodes from ``start`` against the links, nearest first; along inputs of these names only, if any are given."""
    pending = [start]
    seen: set[str] = set()
    while pending and len(seen) < _MOST_STEPS_BACK:
        name = pending.pop(0)
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        yield name
        inputs = nodes[name]["inputs"]
        assert isinstance(inputs, Mapping)
        pending += [source for key, value in inputs.items() if (not keys or key in keys) and (source := _link(value)) is not None]


def _sizes(nodes: Mapping[str, Mapping[str, object]], sampler: str) -> dict[str, object]:
    """Pixels, frames, batch and steps of a sampler: from the nearest node above its latent that has them, or its scheduler's."""
    found: dict[str, object] = {}
    inputs = nodes[sampler]["inputs"]
    assert isinstance(inputs, Mapping)
    latent = _link(inputs.get("latent_image"))
    for name in _upstream(nodes, latent) if latent is not None else ():
        values = nodes[name]["inputs"]
        if isinstance(values, Mapping) and _is_count(values.get("width")) and _is_count(values.get("height")):
            found = {ours: values[theirs] for theirs, ours in _SIZE_INPUTS.items() if _is_count(values.get(theirs))}
            break
    scheduler = _link(inputs.get("sigmas"))
    for name in (sampler, *(_upstream(nodes, scheduler) if scheduler is not None else ())):
        values = nodes[name]["inputs"]
        if isinstance(values, Mapping) and _is_count(values.get("steps")):
            return {**found, "steps": values["steps"]}
    return found


def _asked(nodes: Mapping[str, Mapping[str, object]], path: list[str]) -> dict[str, object]:
    """Budget and reserve of the Optimize node on the way from a sampler to its loader."""
    for name in path:
        values = nodes[name]["inputs"]
        if nodes[name].get("class_type") == OPTIMIZE and isinstance(values, Mapping):
            return {key: values[key] for key in ("budget", "reserve") if isinstance(values.get(key), str)}
    return {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
