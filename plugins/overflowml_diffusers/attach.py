"""What a managed pipeline needs beyond streaming: where it runs, phases that start without a module's own call, and guards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from overflowml_core.errors import Managed
from overflowml_core.runtime.guards import MODULE_MOVES, guard, guard_state

PIPELINE_MOVES = (
    "to",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
    "remove_all_hooks",
    "reset_device_map",
)
MODEL_MOVES = (*MODULE_MOVES, "enable_group_offload", "enable_layerwise_casting")


class Placement:
    """Stands where accelerate's hooks stand (``module._hf_hook``): pipelines ask it for their device, and decorated methods such as
    ``vae.decode`` call it before they run.
    """

    def __init__(self, execution_device: torch.device, enter: Callable[[], None]) -> None:
        self.execution_device = execution_device
        self._enter = enter

    def pre_forward(self, module: object, *args: object, **kwargs: object) -> tuple[tuple[object, ...], dict[str, object]]:
        """Have the component on the device."""
        self._enter()
        return args, kwargs

    def post_forward(self, module: object, output: object) -> object:
        """Nothing to do after a call."""
        return output

    def init_hook(self, module: object) -> object:
        """Nothing to prepare."""
        return module

    def detach_hook(self, module: object) -> object:
        """Called by accelerate when it removes hooks, which would take the plan off half-way."""
        raise Managed("pipeline", "accelerate.hooks.remove_hook_from_module(...)")


def after_attach(target: Any, attachment: Any) -> None:
    """Set the execution device, switch on what variants the plan chose, and guard what would move weights; all ends with the attachment."""
    from diffusers import DiffusionPipeline

    _turn_variants_on(target, attachment)
    _offer_lighter_calls(target, attachment)
    if not isinstance(target, DiffusionPipeline):
        attachment.on_detach(guard(target, MODEL_MOVES, "model"))
        attachment.on_detach(guard_state(target, "model", attachment.holds))
        return
    from overflowml_diffusers.describe import ordered_modules

    device = attachment.device.torch_device
    for name, module in ordered_modules(target).items():
        attachment.on_detach(_place(module, Placement(device, partial(attachment.enter, name))))
        attachment.on_detach(_guard_component(module, device, partial(attachment.recast, name)))
        attachment.on_detach(guard_state(module, "pipeline", attachment.holds))
    attachment.on_detach(guard(target, PIPELINE_MOVES, "pipeline"))


def _modules_of(target: Any) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    from overflowml_diffusers.describe import ordered_modules

    return dict(ordered_modules(target)) if isinstance(target, DiffusionPipeline) else {"model": target}


def _offer_lighter_calls(target: Any, attachment: Any) -> None:
    """Where a VAE runs out of memory with nothing left to stream: slices, and tiles if the plan may change pictures."""
    from overflowml_diffusers.lighter import VaeLighter
    from overflowml_diffusers.variants import switches_of

    may_tile = attachment.plan.limits.quality in ("minimal", "any")
    for module in _modules_of(target).values():
        if switches_of(module):
            lighter = VaeLighter(module, may_tile)
            attachment.on_shortage(module, lighter)
            attachment.on_detach(lighter.undo)


def _turn_variants_on(target: Any, attachment: Any) -> None:
    from overflowml_diffusers.variants import switches_of, turn_on

    modules = _modules_of(target)
    for phase in attachment.plan.phases:
        for name in phase.components:
            if phase.variant and name in modules and switches_of(modules[name]) >= set(phase.variant.split("+")):
                attachment.on_detach(turn_on(modules[name], phase.variant))


def _place(module: Any, placement: Placement) -> Callable[[], None]:
    namespace = vars(module)
    before = namespace.get("_hf_hook")
    namespace["_hf_hook"] = placement

    def undo() -> None:
        if before is None:
            namespace.pop("_hf_hook", None)
        else:
            namespace["_hf_hook"] = before

    return undo


def _guard_component(module: Any, device: torch.device, recast: Callable[[torch.dtype], None]) -> Callable[[], None]:
    """Guard a component, but let pipelines ask it to be where it is (many say ``self.vae.to(device)`` to be sure) and to compute in
    another dtype (SDXL's decode their float16 VAE in float32, and cast it back)."""
    unguard = guard(module, MODEL_MOVES, "pipeline")
    refuse = vars(module)["to"]

    def to(*args: Any, **kwargs: Any) -> Any:
        wanted_device, wanted_dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        same_device = wanted_device is None or wanted_device.type == device.type
        if not same_device:
            return refuse(*args, **kwargs)
        if wanted_dtype is not None and any(p.dtype != wanted_dtype for p in module.parameters() if p.is_floating_point()):
            recast(wanted_dtype)
        return module

    vars(module)["to"] = to
    return unguard
