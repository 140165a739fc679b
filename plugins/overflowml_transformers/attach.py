"""What a managed transformers model needs beyond streaming: a device map that tells the truth, and guards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from overflowml_core.facts import Tier
from overflowml_core.runtime.guards import MODULE_MOVES, guard, guard_state
from overflowml_transformers.caches import know_caches
from overflowml_transformers.experts import take_over

_ON = {Tier.PINNED: "cpu", Tier.RAM: "cpu", Tier.DISK: "disk"}


def after_attach(model: Any, attachment: Any) -> None:
    """Set ``hf_device_map`` and guard the methods that move weights; both end with the attachment."""
    know_caches()
    plan = attachment.plan
    # transformers.pipeline takes the first value for its device; generate looks for "cpu" and "disk" to leave compilation off.
    device_map: OrderedDict[str, str] = OrderedDict({"": plan.device})
    device_map.update((p.block, _ON[p.tier]) for p in plan.placements() if p.tier is not Tier.DEVICE)
    before = vars(model).get("hf_device_map")
    vars(model)["hf_device_map"] = device_map

    def undo() -> None:
        if before is None:
            vars(model).pop("hf_device_map", None)
        else:
            vars(model)["hf_device_map"] = before

    attachment.on_detach(undo)
    attachment.on_detach(_adapters_in_ram(model))
    attachment.on_detach(take_over(model, attachment))
    attachment.on_detach(guard(model, MODULE_MOVES, "model"))
    attachment.on_detach(guard_state(model, "model", attachment.holds))


def _adapters_in_ram(model: Any) -> Callable[[], object]:
    """Have ``load_adapter`` see one place for everything: it would leave adapters of blocks on disk without data."""
    namespace = vars(model)

    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        device_map = namespace["hf_device_map"]
        namespace["hf_device_map"] = {"": "cpu"}
        try:
            return type(model).load_adapter(model, *args, **kwargs)
        finally:
            namespace["hf_device_map"] = device_map

    namespace["load_adapter"] = load_adapter
    return lambda: namespace.pop("load_adapter", None)
