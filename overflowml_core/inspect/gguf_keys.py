"""The metadata of a GGUF file under its architecture's name, read with its type checked. Knows no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overflowml_core.errors import BadCheckpoint
from overflowml_core.inspect.gguf import GgufModel
from overflowml_core.inspect.gguf_cursor import LongValue, Value

AGAIN = "convert it again, or download another copy"
"""The way out of metadata that cannot be."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Metadata of one architecture.

    Attributes:
        model: whose metadata it is.
        architecture: what stands before each key.
        layers: how many there are.
    """

    model: GgufModel
    architecture: str
    layers: int

    def has(self, key: str) -> bool:
        """Whether the file says anything under ``<architecture>.<key>``."""
        return f"{self.architecture}.{key}" in self.model.metadata

    def raw(self, key: str) -> Value | LongValue | None:
        """What stands under ``<architecture>.<key>``, unchecked."""
        return self.model.metadata.get(f"{self.architecture}.{key}")

    def whole(self, key: str, default: int = 0) -> int:
        """A count under ``<architecture>.<key>``; the largest where there is one for each layer.

        Raises:
            BadCheckpoint: it is no count below 2**31.
        """
        value = self.model.metadata.get(f"{self.architecture}.{key}", default)
        return max(self._counts(key, value if isinstance(value, tuple) else (value,)), default=default)

    def each(self, key: str, default: int = 0) -> tuple[int, ...]:
        """A count for every layer, the default where nobody said.

        Raises:
            BadCheckpoint: it is no count below 2**31, or there are not as many as layers.
        """
        value = self.model.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, tuple):
            return self._counts(key, (value,)) * self.layers
        if len(value) < self.layers:
            raise self._unfit(key, value)
        return self._counts(key, value)

    def _counts(self, key: str, values: tuple[Value | LongValue, ...]) -> tuple[int, ...]:
        counts = tuple(int(value) for value in values if isinstance(value, int) and 0 <= value < 2**31)
        if len(counts) < len(values):
            raise self._unfit(key, values if len(values) > 1 else values[0])
        return counts

    def _unfit(self, key: str, value: object) -> BadCheckpoint:
        shown = f"{self.architecture}.{key} is {str(value)[:80]}"
        expected = f"expected a whole number below 2**31, or one for each of {self.layers} blocks"
        return BadCheckpoint(self.model.files[0], f"{shown}; {expected}", AGAIN)


def block_count(model: GgufModel, architecture: str, numbers: Sequence[int]) -> int:
    """Layers by the metadata, held against the tensors. A layer without tensors is a layer (DeciLM skips some).

    Args:
        model: whose layers.
        architecture: what stands before each key.
        numbers: of the layers that have tensors.

    Raises:
        BadCheckpoint: both contradict each other.
    """
    key = f"{architecture}.block_count"
    claimed = model.metadata.get(key, max(numbers) + 1)
    if not isinstance(claimed, int) or isinstance(claimed, bool) or claimed <= max(numbers) or claimed > 2 * len(set(numbers)):
        raise BadCheckpoint(
            model.files[0], f"{key} is {str(claimed)[:40]}, its tensors make {len(set(numbers))} blocks up to number {max(numbers)}", AGAIN
        )
    return claimed
