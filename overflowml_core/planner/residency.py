"""Which blocks of a phase stay on the device: the most bytes that fit beside the staging slots. Knows sizes only, no names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_MOST_STEPS = 60_000
"""Of the exact search. 14 blocks of 14 sizes take at most 2**14 in all, two sizes as many as there are blocks of the larger one."""

_MOST_VISITS = 2_000_000
"""Sizes looked at by the largest-first search; 1000 different sizes take at most half of it."""

_MOST_EXACT_CLASSES = 32
"""With more sizes than this, largest-first comes so close to the optimum that the exact search would only cost time."""

Classes = Sequence[tuple[int, int]]
"""(size in bytes, count) pairs, largest size first."""


@dataclass(frozen=True, slots=True)
class Residency:
    """What stays and how the rest passes through.

    Attributes:
        resident: per block, whether it stays.
        staging_bytes: of the staging buffer; 0 where nothing is streamed.
        slot_bytes: the largest slot in it, that of the largest streamed block.
    """

    resident: tuple[bool, ...]
    staging_bytes: int
    slot_bytes: int

    @property
    def slot_count(self) -> int:
        """How many of the largest streamed block the staging buffer holds."""
        return self.staging_bytes // self.slot_bytes if self.slot_bytes else 0


def choose(sizes_bytes: Sequence[int], owners: Sequence[int], room_bytes: int) -> Residency | None:
    """Choose the resident blocks of a phase.

    Args:
        sizes_bytes: per block in order of execution; 0 takes nothing and stays with its owner.
        owners: per block the index of the block whose tensors it uses, mostly its own.
        room_bytes: what blocks and slots may take together.

    Returns:
        The choice with the most resident bytes, or None where not even one slot for the largest block fits.
    """
    if sum(sizes_bytes) <= room_bytes:
        return Residency((True,) * len(sizes_bytes), 0, 0)
    classes = sorted(Counter(size for size in sizes_bytes if size).items(), reverse=True)
    found = _most_resident(classes, room_bytes) if classes else None
    if found is None:
        return None
    slot_count, counts = found
    stays = _spread_classes(sizes_bytes, {size: count for (size, _), count in zip(classes, counts, strict=True)})
    resident = tuple(stays[owner] for owner in owners)
    slot_bytes = max(size for size, stay in zip(sizes_bytes, resident, strict=True) if not stay)
    return Residency(resident, slot_count * slot_bytes, slot_bytes)


def _most_resident(classes: Classes, room_bytes: int) -> tuple[int, tuple[int, ...]] | None:
    # Two slots: one is computed from while the other is copied into. A third is never free: where it fits beside an optimal
    # choice, a streamed block fits there too and should stay.
    two = _best_counts(classes, room_bytes, slot_count=2)
    # One slot is all that fits below this room. What it keeps there is a floor for all larger rooms, so that
    # granting more memory never streams more; it matters only where a few blocks are much larger than the rest.
    forced_below = _smallest_room(classes, slot_count=2)
    one = _best_counts(classes, min(room_bytes, forced_below - 1), slot_count=1)
    if two is None:
        return None if one is None else (1, one)
    if one is not None and _total(classes, one) > _total(classes, two):
        return 1, one
    return 2, two


def _smallest_room(classes: Classes, slot_count: int) -> int:
    kept = accumulate((size * count for size, count in classes), initial=0)
    return min(above + slot_count * size for above, (size, _) in zip(kept, classes, strict=False))


def _total(classes: Classes, counts: Sequence[int]) -> int:
    return sum(size * count for (size, _), count in zip(classes, counts, strict=True))


def _best_counts(classes: Classes, room_bytes: int, slot_count: int) -> tuple[int, ...] | None:
    """How many of each size stay, when the phase does not fit as a whole.

    The largest streamed block sets the size of the slots. So every size is tried as that one: all larger blocks stay, and
    the rest of the room is filled with what is left of it and the smaller ones. Small slots leave more room: they come first.
    """
    kept = tuple(accumulate((size * count for size, count in classes), initial=0))
    best: tuple[int, ...] | None = None
    best_bytes = -1
    effort = _Effort()
    for index in reversed(range(len(classes))):
        size, count = classes[index]
        capacity_bytes = room_bytes - slot_count * size
        if kept[index] > capacity_bytes or capacity_bytes <= best_bytes or (best is not None and effort.visits <= 0):
            continue
        rest = ((size, count - 1), *classes[index + 1 :])
        counts = _fill(rest, capacity_bytes - kept[index], best_bytes - kept[index], effort)
        if counts is not None:
            best = tuple(count for _, count in classes[:index]) + counts
            best_bytes = _total(classes, best)
    return best


@dataclass(slots=True)
class _Effort:
    """What may still be spent on all the sizes tried together, so that planning stays fast."""

    steps: int = _MOST_STEPS
    visits: int = _MOST_VISITS


def _fill(classes: Classes, capacity_bytes: int, beat_bytes: int, effort: _Effort) -> tuple[int, ...] | None:
    """Counts that come closest to the capacity without passing it; None where they do not beat ``beat_bytes``."""
    best, best_bytes = _largest_first(classes, capacity_bytes)
    effort.visits -= len(classes)
    if len(classes) <= _MOST_EXACT_CLASSES and best_bytes < capacity_bytes:
        best = _exact(classes, capacity_bytes, best, effort)
        best_bytes = _total(classes, best)
    return best if best_bytes > beat_bytes else None


def _largest_first(classes: Classes, capacity_bytes: int) -> tuple[tuple[int, ...], int]:
    counts = []
    left_bytes, smallest_bytes = capacity_bytes, classes[-1][0]
    for size, count in classes:
        if left_bytes < smallest_bytes:
            break
        counts.append(min(count, left_bytes // size))
        left_bytes -= counts[-1] * size
    return (*counts, *[0] * (len(classes) - len(counts))), capacity_bytes - left_bytes


def _exact(classes: Classes, capacity_bytes: int, start: tuple[int, ...], effort: _Effort) -> tuple[int, ...]:
    """Branch and bound from a first guess; the best so far where the steps run out."""
    below = [0, *accumulate(size * count for size, count in reversed(classes))][::-1]
    best, best_bytes = start, _total(classes, start)

    def descend(index: int, left_bytes: int, counts: tuple[int, ...]) -> None:
        nonlocal best, best_bytes
        if index == len(classes):
            if capacity_bytes - left_bytes > best_bytes:
                best, best_bytes = counts, capacity_bytes - left_bytes
            return
        size, count = classes[index]
        for taken in range(min(count, left_bytes // size), -1, -1):
            rest_bytes = left_bytes - taken * size
            # Even with all smaller blocks it would be no better, and taking fewer of this size only makes it worse.
            if capacity_bytes - rest_bytes + min(rest_bytes, below[index + 1]) <= best_bytes or effort.steps <= 0:
                return
            effort.steps -= 1
            descend(index + 1, rest_bytes, (*counts, taken))

    descend(0, capacity_bytes, ())
    return best


def _spread_classes(sizes_bytes: Sequence[int], resident_counts: dict[int, int]) -> list[bool]:
    totals = Counter(sizes_bytes)
    patterns = {size: iter(spread(resident_counts.get(size, total), total)) for size, total in totals.items()}
    return [next(patterns[size]) for size in sizes_bytes]


def spread(chosen_count: int, count: int) -> list[bool]:
    """Choose so many of so many in a row, as evenly as whole numbers allow, also from the end of a pass to the start of the next."""
    half = count // 2
    return [((i + 1) * chosen_count + half) // count > (i * chosen_count + half) // count for i in range(count)]
