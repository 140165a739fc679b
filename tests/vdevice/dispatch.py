"""The one kernel behind every operator of the device: run the CPU kernel on CPU tensors over the same bytes.

The kernel swaps device arguments for their CPU aliases, refuses a mix of host and device tensors as CUDA does, runs the
CPU operator, wraps new results as device allocations, and puts the work on the time line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .config import DEVICE_NAME
from .device import DEVICE
from .internals import flop_formulas
from .memory import alias, is_device, rebind, redispatch, span, to_device

_CPU = torch.device("cpu")
_SCALAR_DTYPES = {int: torch.int64, float: torch.float64, bool: torch.bool, complex: torch.complex128}

# the indices of these (argument 1) may be host tensors on CUDA too
_HOST_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# these give the host a value or a shape that depends on values, so the host waits
_SYNCHRONIZING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# an allocation is a fact about order, but no work
_ALLOCATIONS = {"aten::empty", "aten::empty_strided"}


def _grouped_mm_flop(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """torch has no formula for it: every row of `a` meets the weights of one group."""
    groups = a.shape[0] if a.dim() == 3 else 1
    return int(2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1])


class _Plan:
    """What the schema of an operator says, looked up once."""

    def __init__(self, op: Any) -> None:
        schema = op._schema
        arguments = list(enumerate(schema.arguments))
        self.name: str = schema.name
        self.is_view: bool = op.is_view
        self.is_allocation = self.name in _ALLOCATIONS
        self.is_synchronizing = self.name in _SYNCHRONIZING
        self.host_index = 1 if self.name in _HOST_INDICES else None
        self.flop = flop_formulas().get(op.overloadpacket)
        if self.name == "aten::_grouped_mm":
            self.flop = _grouped_mm_flop
        self.tensor_arguments = [i for i, a in arguments if str(a.type) == "Tensor"]
        written = [(i, a) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self.written = [(i, a.name) for i, a in written]
        # for each result: the argument that it is, or None if it is new
        self.returned: list[tuple[int, str] | None] = []
        for result in schema.returns:
            same = None
            if result.alias_info is not None and result.alias_info.is_write:
                for i, a in written:
                    if a.alias_info.before_set == result.alias_info.before_set:
                        same = (i, a.name)
            self.returned.append(same)


_plans: dict[Any, _Plan] = {}


@dataclass
class _Call:
    """Arguments of one call, translated."""

    device_tensors: list[torch.Tensor] = field(default_factory=list)
    host_tensors: list[torch.Tensor] = field(default_factory=list)
    wants_host: bool = False

    # a method, not a closure: a recursive closure is a reference cycle, which would delay the frees
    def translate(self, x: Any, host_allowed: bool = False) -> Any:
        if isinstance(x, torch.Tensor):
            if is_device(x):
                self.device_tensors.append(x)
                return alias(x)
            if x.dim() and not host_allowed:
                self.host_tensors.append(x)
            return x
        if isinstance(x, torch.device):
            self.wants_host |= x.type == "cpu"
            return _CPU if x.type == DEVICE_NAME else x
        if isinstance(x, (list, tuple)) and x and not isinstance(x[0], (int, float, bool)):
            return [self.translate(y, host_allowed) for y in x]
        return x

    def check_devices(self, op: object) -> None:
        if self.host_tensors and self.device_tensors:
            host = self.host_tensors[0]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE_NAME}:0 and "
                f"{host.device}! (operator {op}, host tensor of shape {tuple(host.shape)})"
            )


def fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The PrivateUse1 fallback: serves every operator that `kernels` does not."""
    plan = _plans.get(op)
    if plan is None:
        plan = _plans[op] = _Plan(op)
    if plan.is_view:
        return redispatch(op, *args, **kwargs)
    with DEVICE.lock:
        return _run(op, plan, args, kwargs)


def _run(op: Any, plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call, clock = _Call(), DEVICE.clock
    host_args = [call.translate(x, i == plan.host_index) for i, x in enumerate(args)]
    host_kwargs = {name: call.translate(x) for name, x in kwargs.items()}
    call.check_devices(op)
    for i in plan.tensor_arguments:  # a wrapped number reaches a Python kernel as a plain number
        if i < len(host_args) and type(host_args[i]) in _SCALAR_DTYPES:
            host_args[i] = torch.scalar_tensor(host_args[i], dtype=_SCALAR_DTYPES[type(host_args[i])])
    written = _written_tensors(plan, args, kwargs, host_args, host_kwargs)

    # order first: nothing is computed from bytes that another stream may still be writing
    written_ids = {id(tensor) for tensor, _ in written}
    reads = [span(t) for t in call.device_tensors if id(t) not in written_ids]
    writes = [span(t) for t, _ in written]
    stream = clock.begin(plan.name, reads, writes)
    clock.land(stream)
    out = op(*host_args, **host_kwargs)

    for tensor, host in written:
        if tensor.shape != host.shape or tensor.stride() != host.stride():
            rebind(tensor, host)
    if len(plan.returned) == 1:
        result = _result(out, plan.returned[0], args, kwargs, call.wants_host)
    else:
        result = tuple(_result(o, s, args, kwargs, call.wants_host) for o, s in zip(out or (), plan.returned, strict=True))

    if not plan.is_allocation:
        new = [t for t in (result if isinstance(result, (list, tuple)) else [result]) if is_device(t)]
        nbytes = sum(hi - lo for _, lo, hi in reads + writes)
        nbytes += sum(t.nbytes for t in new if id(t) not in written_ids)
        flop = plan.flop(*host_args, **host_kwargs, out_val=out) if plan.flop else 0
        seconds = max(flop / DEVICE.config.flop_per_s, nbytes / DEVICE.config.memory_bytes_per_s)
        clock.place("compute", plan.name, seconds, stream)
    if plan.is_synchronizing:
        clock.synchronize(stream)
    return None if not plan.returned else result


def _written_tensors(
    plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any], host_args: list[Any], host_kwargs: dict[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Device tensors that the operator changes, each with the CPU tensor that it will change in their place."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, name in plan.written:
        holder: Any = host_args if i < len(args) else host_kwargs
        key: Any = i if i < len(args) else name
        original = args[i] if i < len(args) else kwargs.get(name)
        if isinstance(original, (list, tuple)):
            pairs += [(t, h) for t, h in zip(original, holder[key], strict=True) if is_device(t)]
        elif isinstance(original, torch.Tensor) and is_device(original):
            if original.numel() == 0 and not original.untyped_storage().nbytes():
                # `out=` to be filled: growing the block's own memory would move it under its address
                holder[key] = torch.empty(original.shape, dtype=original.dtype)
            pairs.append((original, holder[key]))
    return pairs


def _result(out: Any, same: tuple[int, str] | None, args: tuple[Any, ...], kwargs: dict[str, Any], wants_host: bool) -> Any:
    if same is not None:
        i, name = same
        return args[i] if i < len(args) else kwargs[name]
    if isinstance(out, torch.Tensor):
        return out if wants_host else to_device(out)
    if isinstance(out, (list, tuple)):
        return type(out)(_result(x, None, args, kwargs, wants_host) for x in out)
    return out
