"""Sorts the tensors of a file into blocks and what lies outside them, by their names alone, and makes components of them.

The rule is that of ``runtime.structure`` for modules: the entries of the outermost numbered lists of two or more, if they have children.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from overflowml_core.facts import Block, Component, Experts, TensorFact, tensors_fingerprint
from overflowml_core.inspect.ggml_types import PLAIN_TYPES
from overflowml_core.layout import align, slab_bytes
from overflowml_core.work import PassProfile

_ENTRY = re.compile(r"((?:[^.]+\.)*?[^.]+)\.(\d{1,6})\.([^.]+\..+)", re.ASCII)
"""A list's name, the number of an entry, and what the entry holds: at least a child and its tensor."""

_ORDER = (
    ("refiner",),
    ("encoder", "down_blocks", "input_blocks"),
    ("mid",),
    ("single", "decoder", "up_blocks", "output_blocks"),
)
"""Words in the names of lists in the order in which the lists run; all others stand between the third and the fourth. FLUX.1 runs double
before single blocks, Lumina 2 its refiners first, a UNet its inputs, middle and outputs."""

_PLAIN_LISTS_RANK = 3


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that move together: the name of their block, empty for those outside the blocks, and the tensors under their full names."""

    name: str
    tensors: tuple[TensorFact, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors)


def element_count(shape: Iterable[int]) -> int:
    """Elements of a tensor."""
    count = 1
    for size in shape:
        count *= size
    return count


def find_groups(tensors: Sequence[TensorFact]) -> tuple[tuple[TensorGroup, ...], TensorGroup]:
    """The blocks in the order in which they most likely run, and the tensors outside them."""
    entries: dict[tuple[str, int], list[TensorFact]] = {}
    outside: list[TensorFact] = []
    for tensor in tensors:
        match = _ENTRY.fullmatch(tensor.name)
        if match is None:
            outside.append(tensor)
        else:
            entries.setdefault((match[1], int(match[2])), []).append(tensor)
    sizes = Counter(name for name, _ in entries)
    blocks: list[TensorGroup] = []
    for name, number in sorted(entries, key=_rank):
        members = entries[name, number]
        if sizes[name] < 2:
            outside.extend(members)
        else:
            blocks.append(TensorGroup(f"{name}.{number}", tuple(members)))
    return tuple(blocks), TensorGroup("", tuple(outside))


def _rank(key: tuple[str, int]) -> tuple[int, str, int]:
    name, number = key
    place = next((rank for rank, words in enumerate(_ORDER) if any(word in name for word in words)), None)
    rank = _PLAIN_LISTS_RANK if place is None else place if place < _PLAIN_LISTS_RANK else place + 1
    # Stable Diffusion's own VAE counts the stages of its decoder from the end.
    return rank, name, -number if name.endswith("decoder.up") else number


def make_block(group: TensorGroup, experts: Experts | None = None, expert_names: frozenset[str] = frozenset()) -> Block:
    """A block of these tensors.

    Args:
        group: its tensors.
        experts: its routed experts, None in a dense block.
        expert_names: tensors that belong to these.
    """
    by_dtype: Counter[str] = Counter()
    linear = 0
    packed = False
    for tensor in group.tensors:
        by_dtype[tensor.dtype] += tensor.nbytes
        if len(tensor.shape) == 2:
            packed |= tensor.dtype not in PLAIN_TYPES
            linear += element_count(tensor.shape) if tensor.dtype in PLAIN_TYPES and tensor.name not in expert_names else 0
    return Block(
        name=group.name,
        weight_count=sum(element_count(tensor.shape) for tensor in group.tensors),
        stored_bytes=group.nbytes,
        slab_bytes=slab_bytes(tensor.nbytes for tensor in group.tensors),
        bytes_by_dtype=tuple(sorted(by_dtype.items())),
        keep_format=packed,
        linear_count=linear,
        experts=experts,
    )


@dataclass(frozen=True, slots=True)
class ComponentName:
    """What a component is called, and its class as far as its tensors tell."""

    name: str
    class_name: str


def make_component(
    name: ComponentName, groups: Sequence[TensorGroup], outside: TensorGroup, blocks: Sequence[Block], profiles: tuple[PassProfile, ...]
) -> Component:
    """A component of blocks that were made of ``groups``, with its passes."""
    everything = [*outside.tensors, *(tensor for group in groups for tensor in group.tensors)]
    by_dtype: Counter[str] = Counter()
    for tensor in everything:
        by_dtype[tensor.dtype] += tensor.nbytes
    return Component(
        name=name.name,
        class_name=name.class_name,
        blocks=tuple(blocks),
        resident_bytes=sum(align(tensor.nbytes) for tensor in outside.tensors),
        resident_weight_count=sum(element_count(tensor.shape) for tensor in outside.tensors),
        bytes_by_dtype=tuple(sorted(by_dtype.items())),
        phase=name.name,
        passes=max(sum(profile.count for profile in profiles), 1),
        activation_bytes=max((profile.activation_bytes for profile in profiles), default=0),
        activation_source="analytic" if profiles else "none",
        fingerprint=tensors_fingerprint(name.class_name, everything),
        profiles=profiles,
    )
