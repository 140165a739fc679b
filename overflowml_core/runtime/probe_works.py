"""What one operation costs: its kind, floating-point operations, bytes it touches, and what is needed to run it again on real data.

Knows operations by their schema and a handful by name; knows no model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from overflowml_core.runtime.structure import DTYPE_NAMES
from overflowml_core.work import Work

ATTENTION = "fused_attention"
"""Name of the fused attention in signatures and recipes."""

GROUPED = "grouped_mm"
"""Name of the product of rows with one matrix of a stack each (a bank of experts) in signatures and recipes."""

RMS_NORM = "fused_rms_norm"
"""Name of the fused RMS norm in signatures and recipes."""

_FREE = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_local_scalar_dense"})
"""Operations that launch no kernel, beside all those that return views."""

_WRITES_ONLY = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "masked_fill_", "bernoulli_"})
"""Operations in place that do not read, or hardly read, what they overwrite."""

_GATHERS = frozenset({"embedding", "index", "index_select", "gather", "_unsafe_index"})
"""Operations that read of their first argument only what they return."""

_SCATTERS = frozenset({"index_put_", "index_copy_", "scatter_", "index_add_", "scatter_add_"})
"""Operations that write into their first argument only what their last tensor brings."""

_GROUPED = frozenset({GROUPED, "_grouped_mm", "_scaled_grouped_mm", "grouped_mm_fallback"})

_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "_scaled_mm"}) | _GROUPED

_CONVOLUTIONS = frozenset({"convolution", "_convolution", "cudnn_convolution", "convolution_overrideable", "mkldnn_convolution"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor argument without its data: elements in each dimension, strides in elements, dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Recipe:
    """One operation with its arguments; tensors are :class:`TensorSpec`.

    Attributes:
        operation: an overload of ``torch.ops``, or ``ATTENTION`` or ``RMS_NORM``.
        args: positional arguments.
        kwargs: named arguments as (name, value) pairs.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


class Ledger:
    """Works by kind, dtype and signature, in order of their first appearance; equal operations are added up."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], list[int]] = {}

    def add(self, work: Work) -> None:
        """Add one operation."""
        entry = self._entries.setdefault((work.kind, work.dtype, work.signature), [0, 0, 0, 0])
        for index, value in enumerate((work.flop, work.traffic_bytes, work.weight_bytes, work.calls)):
            entry[index] += value

    def works(self) -> tuple[Work, ...]:
        """What was added up so far."""
        return tuple(
            Work(kind, dtype, flop, traffic, weights, calls, name)
            for (kind, dtype, name), (flop, traffic, weights, calls) in self._entries.items()
        )


class Seen:
    """Turns operations into works, and remembers a recipe for each signature."""

    def __init__(self, is_weight: Callable[[torch.Tensor], bool], recipes: dict[str, Recipe]) -> None:
        self._is_weight = is_weight
        self._recipes = recipes
        self._names: dict[tuple[Any, ...], str] = {}

    def note(self, ledger: Ledger, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> None:
        """Add an operation to a ledger, unless it launches nothing.

        Args:
            ledger: of the block that it happened in.
            func: an overload of ``torch.ops``, or ``ATTENTION`` or ``RMS_NORM``.
            args: its positional arguments.
            kwargs: its named arguments.
            tensors: all tensors among these.
            out: its result.
        """
        name = func if isinstance(func, str) else func._schema.name.partition("::")[2]
        results = tensors_in(out)
        if not results or name in _FREE or (not isinstance(func, str) and _is_view(func)):
            return
        kind = _kind(name)
        computes_in = tensors[0] if kind != "memory" and tensors else results[0]
        traffic, weights = self._traffic(name, tensors, results)
        work = Work(
            kind=kind,
            dtype=DTYPE_NAMES.get(computes_in.dtype, str(computes_in.dtype)),
            flop=_flop(name, func, args, kwargs, tensors, out),
            traffic_bytes=traffic,
            weight_bytes=weights,
            signature=self._signature(name, func, args, kwargs, tensors),
        )
        ledger.add(work)

    def _traffic(self, name: str, tensors: list[torch.Tensor], results: list[torch.Tensor]) -> tuple[int, int]:
        written = sum(map(touched_bytes, results))
        total = weights = 0
        distinct: set[tuple[int, int, tuple[int, ...]]] = set()
        for index, tensor in enumerate(tensors):
            key = (_storage(tensor), tensor.storage_offset(), tuple(tensor.shape))
            if key in distinct:
                continue
            distinct.add(key)
            nbytes = touched_bytes(tensor)
            if index == 0 and name in _WRITES_ONLY:
                continue
            if index == 0 and name in _GATHERS:
                nbytes = min(nbytes, written)
            elif index == 0 and name in _SCATTERS:
                written = min(written, touched_bytes(tensors[-1]))
                nbytes = written
            elif index == 1 and name in _GROUPED and tensor.dim() == 3 and tensors[0].dim() == 2:
                # A row meets one expert, so that no more experts are read than there are rows.
                nbytes = nbytes // max(tensor.shape[0], 1) * min(tensor.shape[0], tensors[0].shape[0])
            total += nbytes
            if self._is_weight(tensor):
                weights += nbytes
        return total + written, weights

    def _signature(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> str:
        key = (name, *((tuple(t.shape), t.dtype, t.stride()) for t in tensors))
        known = self._names.get(key)
        if known is None:
            shapes = [[list(t.shape), str(t.dtype), t.is_contiguous()] for t in tensors]
            known = hashlib.sha256(repr([name, shapes]).encode()).hexdigest()[:12]
            self._names[key] = known
            if known not in self._recipes:
                specs = _specified((args, tuple(kwargs.items())))
                self._recipes[known] = Recipe(func, specs[0], specs[1])
        return known


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in arguments or results: through lists, tuples and mappings, and through objects that hold tensors as a mapping does."""
    found: list[torch.Tensor] = []
    pending: list[object] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            pending.extend(reversed(item))
        elif isinstance(item, dict):
            pending.extend(reversed(list(item.values())))
    return found


def touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, those of an expanded dimension once."""
    if tensor.layout is not torch.strided:
        return int(tensor.numel() * tensor.element_size())
    return int(math.prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size())


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _kind(name: str) -> str:
    if name in _MATMULS:
        return "matmul"
    if name in _CONVOLUTIONS:
        return "conv"
    if name == ATTENTION or name.startswith("_scaled_dot_product"):
        return "attention"
    return "memory"


def _flop(name: str, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> int:
    """Floating-point operations by torch's own formulas (``torch.utils.flop_counter``), and three that it lacks."""
    if name == ATTENTION:
        query, key, value = tensors[:3]
        return int(2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    if name in ("mv", "dot", "vdot"):
        return int(2 * tensors[0].numel())
    if name == "addmv":
        return int(2 * tensors[1].numel())
    if name in _GROUPED:
        return int(2 * tensors[0].numel() * tensors[1].shape[-1])
    formula = None if isinstance(func, str) else flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _specified(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), tuple(value.stride()) if value.layout is torch.strided else (), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_specified(item) for item in value)
    return value


_GROUPED_CALLS = tuple(
    getattr(where, name) for where, name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(where, name)
)

_REPLACED = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.rms_norm, torch.rms_norm, *_GROUPED_CALLS)


class FusedKernels(TorchFunctionMode):
    """Takes attention, RMS norm and products with stacked experts as the single kernels that a GPU has for them.

    Without it the CPU's code would be traced: attention through a matrix of all pairs of tokens, RMS norm in six steps in float32.
    """

    def __init__(self, has_no_data: Callable[[torch.Tensor], bool], note: Callable[[Any, Any, Any, list[torch.Tensor], Any], None]) -> None:
        super().__init__()
        self._has_no_data = has_no_data
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace these functions, pass on all others."""
        kwargs = kwargs or {}
        if func not in _REPLACED or not any(map(self._has_no_data, tensors_in((args, kwargs)))):
            return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in _GROUPED_CALLS:
            return self._grouped(*args, **kwargs)
        return self._rms_norm(func, *args, **kwargs)

    def _attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **options: Any
    ) -> Any:
        # Flash kernels return (batch, heads, tokens, features) as a transposed view of a block in (batch, tokens, heads, features), so that
        # the transposition that usually follows copies nothing.
        *batch, heads, tokens, _ = query.shape if query.dim() > 3 else (1, *query.shape)
        out = query.new_empty(*batch, tokens, heads, value.shape[-1]).transpose(-3, -2)
        out = out if query.dim() > 3 else out.squeeze(0)
        tensors = [t for t in (query, key, value, attn_mask) if t is not None]
        self._note(ATTENTION, (query, key, value, attn_mask), {"is_causal": bool(is_causal), **options}, tensors, out)
        return out

    def _grouped(self, mat_a: Any, mat_b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        # torch's rule for shapes without data knows bfloat16 alone; its kernels know more.
        out = mat_a.new_empty(*mat_a.shape[:-1], mat_b.shape[-1], dtype=out_dtype or mat_a.dtype)
        options = {"offs": offs, "bias": bias, "out_dtype": out_dtype}
        self._note(GROUPED, (mat_a, mat_b), options, [t for t in (mat_a, mat_b, offs, bias) if t is not None], out)
        return out

    def _rms_norm(self, func: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        if weight is not None and weight.dtype is not input.dtype:
            return func(input, normalized_shape, weight, eps)  # a GPU falls back to single steps here, too
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
        self._note(RMS_NORM, (input, tuple(normalized_shape), weight, eps), {}, [t for t in (input, weight) if t is not None], out)
        return out
