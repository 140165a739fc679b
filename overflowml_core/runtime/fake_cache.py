"""Remembers what operations make of shapes, so that equal ones of later layers need not be worked out again. Knows no values."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_CPU = torch.device("cpu")


class ShapeCache:
    """Results of operations by their arguments' shapes, strides and dtypes; only of those that make new tensors and nothing else.

    torch's own cache of fake tensors answers the same question, for views, other devices and symbolic shapes, too; with this one before
    it a trace takes about a quarter less time.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._known: dict[Any, tuple[bool, tuple[tuple[Any, Any, torch.dtype], ...]]] = {}

    def key(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the result depends on; None where that cannot be said."""
        if any(value.alias_info is not None for value in func._schema.returns) or func._schema.is_mutable:
            return None
        try:
            key = (func, _spelled(args), _spelled(kwargs))
            hash(key)
        except TypeError:
            return None
        return key

    def get(self, key: Any) -> Any:
        """New tensors like those of an equal operation before, None where there was none."""
        known = self._known.get(key)
        if known is None:
            return None
        single, specs = known
        made = [
            FakeTensor(self._fake, torch.empty_strided(size, stride, dtype=dtype, device="meta"), _CPU) for size, stride, dtype in specs
        ]
        return made[0] if single else tuple(made)

    def put(self, key: Any, tensors: list[torch.Tensor], out: Any) -> None:
        """Remember a result, if it is nothing but tensors with storages of their own."""
        results = [out] if isinstance(out, torch.Tensor) else out
        if not isinstance(results, (list, tuple)) or isinstance(out, list):
            return
        taken = {id(tensor) for tensor in tensors} | {t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided}
        specs = []
        for tensor in results:
            if type(tensor) is not FakeTensor or tensor.layout is not torch.strided or tensor.device != _CPU or tensor.constant is not None:
                return
            storage = tensor.untyped_storage()
            whole = torch._prims_common.compute_required_storage_length(tensor.shape, tensor.stride(), 0) * tensor.element_size()
            if storage._cdata in taken or tensor.storage_offset() or storage.nbytes() != whole:
                return
            taken.add(storage._cdata)
            specs.append((tensor.shape, tensor.stride(), tensor.dtype))
        if specs:
            self._known[key] = (isinstance(out, torch.Tensor), tuple(specs))


def _spelled(value: Any) -> Any:
    """Arguments as something that can be compared and hashed; numbers with their type, since 1, 1.0 and True are not one to torch."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise TypeError
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_spelled, value))
    if isinstance(value, dict):
        return tuple((name, _spelled(item)) for name, item in value.items())
    return type(value), value
