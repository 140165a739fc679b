"""The only file that touches the running host: its devices, models, files and page. Imports it inside functions, and patches nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from overflowml_comfyui.learning import link_bytes_per_s, taught_rates, with_host_links
from overflowml_comfyui.lowering import DeviceState, headroom_bytes, reserve_bytes
from overflowml_comfyui.measurement import Measurement, Measurements
from overflowml_core import environment, session
from overflowml_core.errors import NotAModel
from overflowml_core.facts import Component, Machine
from overflowml_core.guard import Cleaning, MemoryGuard
from overflowml_core.inspect.calibration import correct_calibration
from overflowml_core.plan import Plan

_log = logging.getLogger("overflowml")

WRAPPER_KEY = "overflowml"
"""Under this key our wrappers hang on a MODEL; adding them again replaces nothing of others."""


def join_plugins() -> None:
    """Have this process's plans know the host's models, where no installed entry point did so already (a checkout on the path)."""
    import overflowml_comfyui

    plugins = session.plugins()
    if "comfyui" not in plugins.names():
        plugins.register(overflowml_comfyui, "comfyui")


def measurements() -> Measurements:
    """What was measured on this machine so far."""
    return Measurements(environment.cache_folder() / "comfyui" / "measurements.json")


def machine() -> Machine:
    """The machine as the host uses it: no accelerator where it was started with ``--cpu``, and what its own models hold counts as free,
    because it gives that back."""
    import comfy.model_management as management

    found = session.detect()
    device = management.get_torch_device()
    if device.type == "cpu":
        return replace(found, accelerators=())
    own = [a for a in found.accelerators if a.kind == device.type and a.index == (device.index or 0)]
    if not own:
        return found
    free_bytes = min(_free_bytes(device), own[0].total_bytes)
    return with_host_links(replace(found, accelerators=(replace(own[0], free_bytes=free_bytes),)), measurements().links())


def learn(component: Component, key: str, measured: Measurement, samples: int) -> None:
    """Keep what a run took: for the report, and in the machine's calibration, where it has one.

    Args:
        component: what ran, with the passes that were planned; without passes where it ran at other sizes.
        key: under which the run is kept.
        measured: the run.
        samples: images or videos in a pass as it was planned.
    """
    import comfy.model_management as management

    found = session.detect()
    is_other = management.get_torch_device().type != found.compute.kind  # --cpu on a machine with a card: the kept rates are the card's
    rate = 0.0 if is_other else link_bytes_per_s(found.rates, component, measured)
    measurements().keep(key, replace(measured, link_bytes_per_s=rate))
    if not is_other:
        correct_calibration(found, lambda rates: taught_rates(rates, component, measured, samples), environment.cache_folder())


def has_accelerator() -> bool:
    """Whether the machine has a device that the host may use, whether it does or not."""
    return bool(session.detect().accelerators)


def _free_bytes(device: Any) -> int:
    """Free on a device, with what loaded models hold there."""
    import comfy.model_management as management

    held = sum(int(one.model_loaded_memory()) for one in management.current_loaded_models if one.device == device and not _is_cpu(device))
    return int(management.get_free_memory(device)) + held


def _is_cpu(device: Any) -> bool:
    return getattr(device, "type", "cpu") == "cpu"


def is_dynamic(patcher: Any) -> bool:
    """Whether the host's dynamic engine streams this model. Hosts before 2026 have none."""
    ask = getattr(patcher, "is_dynamic", None)
    return bool(ask()) if callable(ask) else False


def _headroom_control() -> Any:
    """What sets and tells the free memory that the dynamic engine keeps (comfy-aimdo 0.6); None where it cannot be set while it runs."""
    try:
        from comfy_aimdo import control
    except ImportError:
        return None
    return control if hasattr(control, "set_simple_vram_headroom") and hasattr(control, "get_simple_vram_headroom") else None


def engine_sentence(patcher: Any, is_capped: bool) -> str:
    """How the host carries a plan for this model out.

    Args:
        patcher: of the model.
        is_capped: a budget was asked for.
    """
    if is_dynamic(patcher) and not is_capped:
        return "This host streams the model with its dynamic engine, which takes what is free; no budget was asked for."
    if is_dynamic(patcher) and _headroom_control() is not None:
        return "This host streams the model with its dynamic engine: while it samples, all of the device but the budget is kept free."
    if is_dynamic(patcher):
        return (
            "This host streams the model with its dynamic engine, which takes a limit for all models at its start alone: "
            "the budget is checked and reported here, and kept by the start flag --vram-headroom."
        )
    if _is_cpu(patcher.load_device):
        return "This host computes in RAM (--cpu): all weights stay there, and a budget is checked, not enforced."
    return "This host loads as many weights as fit and streams the rest; while this model samples, it keeps the plan's reserve free."


def module_of(model: object, what: str) -> tuple[Any, Any]:
    """The patcher and the torch module behind a MODEL, a CLIP or a VAE.

    Args:
        model: what a node was given.
        what: "MODEL", "CLIP" or "VAE".

    Raises:
        NotAModel: it holds no torch module, as some packs' own objects.
    """
    import torch

    patcher = model if what == "MODEL" else getattr(model, "patcher", None)
    inner = getattr(patcher, "model", None)
    module = getattr(inner, "diffusion_model", inner)
    if not isinstance(module, torch.nn.Module):
        raise NotAModel(f"a {what} of class {type(model).__name__}", "connect one that ComfyUI's own loaders made")
    return patcher, module


def latent_format_of(patcher: Any) -> Any:
    """How a model's latents become pixels; None where the model does not say."""
    return getattr(patcher.model, "latent_format", None)


def sizes_of(latent_format: Any, shape: Sequence[int]) -> dict[str, int]:
    """Pixels, frames and batch of a latent, by the model's own latent format; batch alone where it has none.

    Args:
        latent_format: of the model that samples it.
        shape: batch, channels, (frames,) height and width.
    """
    if not shape:
        return {}
    pixels = getattr(latent_format, "spacial_downscale_ratio", None)
    if len(shape) not in (4, 5) or not isinstance(pixels, int):
        return {"batch": shape[0]}
    sizes = {"batch": shape[0], "height": shape[-2] * pixels, "width": shape[-1] * pixels}
    every = getattr(latent_format, "temporal_downscale_ratio", 1)
    return {**sizes, "frames": (shape[2] - 1) * int(every) + 1} if len(shape) == 5 else sizes


def file_of(folder: str, name: str) -> Path | None:
    """Where a file of one of the host's folder kinds lies; None where it is not there."""
    import folder_paths

    found = folder_paths.get_full_path(folder, name)
    return None if found is None else Path(found)


def model_files() -> list[str]:
    """Files that can be previewed, as "folder kind/name"."""
    import folder_paths

    kinds = ("diffusion_models", "checkpoints", "text_encoders", "vae")
    known = [kind for kind in kinds if kind in folder_paths.folder_names_and_paths]
    names = [f"{kind}/{name}" for kind in known for name in folder_paths.get_filename_list(kind)]
    return [name for name in names if name.endswith((".safetensors", ".gguf"))]


def loaded_weights(guider: Any) -> tuple[int, int]:
    """Bytes of a sampler's model on the device, and of those that the host brings in for each call; zeros where it does not say.

    Args:
        guider: the host's, whose model is loaded.
    """
    patcher = getattr(guider, "model_patcher", None)
    if patcher is None:
        return 0, 0
    total_bytes, resident_bytes = int(patcher.model_size()), int(patcher.loaded_size())
    return resident_bytes, max(total_bytes - resident_bytes, 0)


def start_flags() -> Mapping[str, object]:
    """The host's start arguments by name, those that this version has."""
    from comfy.cli_args import args

    flags: Mapping[str, object] = vars(args)
    return flags


def free_memory(nbytes: int) -> tuple[int, Cleaning]:
    """Have the host unload models until so many bytes of its device are free; then give back what nobody uses.

    The models are the host's to unload. What is left of them, and of everything else in this process, is cleaned by overflowml's own
    guard: garbage, torch's caches on every device, and freed pages of RAM, which the host keeps.

    Args:
        nbytes: that shall be free.

    Returns:
        What is free now, in bytes, and what the cleaning gave back.
    """
    import comfy.model_management as management

    device = management.get_torch_device()
    management.free_memory(nbytes, device)
    management.soft_empty_cache()  # of devices that the host alone knows, too
    cleaning = MemoryGuard().clean()
    return int(management.get_free_memory(device)), cleaning


def send(event: str, values: Mapping[str, object], client: str | None = None) -> None:
    """Tell the page something; nothing where there is no server (the host's classes used by a script).

    Args:
        event: its name behind "overflowml.".
        values: plain ones.
        client: the page that asked; None for all.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(f"overflowml.{event}", dict(values), client)


@contextlib.contextmanager
def raised_reserve(nbytes: int) -> Iterator[None]:
    """Have the host keep so many bytes of the device free of weights, for a while."""
    import comfy.model_management as management

    before = management.EXTRA_RESERVED_VRAM
    management.EXTRA_RESERVED_VRAM = nbytes
    try:
        yield
    finally:
        management.EXTRA_RESERVED_VRAM = before


def with_reserve(plan: Plan, is_capped: bool) -> Callable[..., Any]:
    """A wrapper around the host's preparation of a sampler, which is where it loads the model: keeps the plan's reserve free meanwhile.

    Args:
        plan: of the model.
        is_capped: the budget was asked for.
    """

    def prepare(executor: Any, model: Any, noise_shape: Any, conds: Any, *rest: Any, **named: Any) -> Any:
        if is_dynamic(model):
            return executor(model, noise_shape, conds, *rest, **named)
        import comfy.model_management as management
        import comfy.sampler_helpers

        estimate, _ = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
        state = DeviceState(_free_bytes(model.load_device), int(estimate), int(management.EXTRA_RESERVED_VRAM))
        with raised_reserve(reserve_bytes(plan, state, is_capped)):
            return executor(model, noise_shape, conds, *rest, **named)

    return prepare


def with_headroom(plan: Plan, is_capped: bool) -> Callable[..., Any]:
    """A wrapper around the host's sampler: has the dynamic engine keep all but the plan's budget free meanwhile, where it can be told so.

    Args:
        plan: of the model.
        is_capped: the budget was asked for.
    """

    def sample(executor: Any, guider: Any, *rest: Any, **named: Any) -> Any:
        control, patcher = _headroom_control(), getattr(guider, "model_patcher", None)
        if control is None or patcher is None or not is_capped or not is_dynamic(patcher):
            return executor(guider, *rest, **named)
        import comfy.model_management as management

        try:
            before = int(control.get_simple_vram_headroom())
            total_bytes = int(management.get_total_memory(patcher.load_device))
            control.set_simple_vram_headroom(headroom_bytes(plan, total_bytes, before, is_capped))
        except (RuntimeError, ValueError) as error:  # its library is not loaded
            _log.warning("the budget is not enforced: the dynamic engine takes no headroom (%s)", error)
            return executor(guider, *rest, **named)
        try:
            return executor(guider, *rest, **named)
        finally:
            control.set_simple_vram_headroom(before)

    return sample
