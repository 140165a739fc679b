"""Which storages are alive, how many bytes they have, and the most there ever were. Knows nothing of operations."""

from __future__ import annotations

import weakref

import torch

from overflowml_core.layout import align


class LiveMemory:
    """Bytes of the storages of all tracked tensors, each one rounded up to what torch's allocators hand out.

    Attributes:
        current: bytes alive now.
        peak: most bytes alive at once so far.
    """

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._excluded: dict[int, bool] = {}
        self._kept: list[torch.UntypedStorage] = []
        self._marks: list[int] = []

    def track(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now until it is freed; once, however many tensors share it."""
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._excluded:
            return
        nbytes = align(storage.nbytes())
        self._live[key] = (nbytes, weakref.ref(storage, lambda _, key=key: self._freed(key)))  # type: ignore[misc]
        self.current += nbytes
        if self.current > self.peak:
            self.peak = self.current
        if self._marks and self.current > self._marks[-1]:
            self._marks[-1] = self.current

    def exclude(self, tensor: torch.Tensor, is_weight: bool) -> None:
        """Never count a tensor's storage: it is a weight (a parameter) or a buffer, which the plan counts apart."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._kept.append(storage)  # keeps the address from being used again
        self._excluded[storage._cdata] = is_weight
        self._freed(storage._cdata)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the storage of a parameter."""
        return tensor.layout is torch.strided and self._excluded.get(tensor.untyped_storage()._cdata, False)

    def begin(self) -> int:
        """Start to look for a peak; give the answer to :meth:`end`."""
        self._marks.append(self.current)
        return len(self._marks)

    def end(self, mark: int) -> int:
        """Most bytes alive at once since :meth:`begin`, whatever was begun inside included."""
        highest = max(self._marks[mark - 1 :], default=self.current)
        del self._marks[mark - 1 :]
        if self._marks and highest > self._marks[-1]:
            self._marks[-1] = highest
        return highest

    def close(self) -> None:
        """Forget everything."""
        self._live.clear()
        self._excluded.clear()
        self._kept.clear()
        self._marks.clear()

    def _freed(self, key: int) -> None:
        known = self._live.pop(key, None)
        if known is not None:
            self.current -= known[0]
