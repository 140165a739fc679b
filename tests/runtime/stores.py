"""A packed store as a process has it, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from overflowml_core.runtime.kept_file import SLAB_OFFSET_BYTES, Title
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab_content import Content
from overflowml_core.runtime.store import Packed, PackedStore

NBYTES = 5000
FILE_BYTES = NBYTES + SLAB_OFFSET_BYTES


def content(number: int = 0) -> Content:
    return Content(f"{number:064x}", Title("/models/m", f"blocks.{number}", "float32"), ())


def slab(number: int = 0, nbytes: int = NBYTES) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


class Store:
    """A store as a process has it, and how often it had to make a slab."""

    def __init__(self, folder: Path, cap_bytes: int | None = None) -> None:
        self.reader = FileReader()
        self.store = PackedStore(folder, self.reader, cap_bytes)
        self.made: list[int] = []

    def get(self, number: int = 0, keep: bool = True) -> Packed:
        def make(buffer: torch.Tensor) -> None:
            assert not buffer.any()
            self.made.append(number)
            buffer.copy_(slab(number))

        packed = self.store.slab(NBYTES, make, content(number) if keep else None)
        assert torch.equal(packed.view, slab(number))
        buffer = torch.zeros(NBYTES, dtype=torch.uint8)
        self.reader.read([packed.piece], buffer)
        assert torch.equal(buffer, slab(number))
        if packed.seal is not None:
            packed.seal.check(0, memoryview(buffer.numpy()))
            assert packed.seal.is_open
        return packed

    def close(self) -> None:
        self.reader.close()
        self.store.close()


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem, 16) for path in folder.glob("*.slab"))
