"""Weights that the host puts together from several tensors of a checkpoint: which pieces of its files they are.

Follows the host's own conversions (transformers 5.23, core_model_loading.py: ``MergeModulelist``, ``Concatenate``) on places in files
instead of on values. Whatever computes with elements, reorders or drops them is left to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from overflowml_core.loading import Origin

_LEAST_CUT_BYTES = 4096
"""A concatenation inside of tensors cuts them. Smaller cuts than a page are more work to read than for the host to put together."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor by its shape and the pieces of files that it is made of, in the order of its elements, all of the same size."""

    shape: tuple[int, ...]
    pieces: tuple[Origin, ...]


def pieces_of(converter: Any, sources: Mapping[str, Sequence[Origin]], shape: tuple[int, ...]) -> tuple[Origin, ...]:
    """The pieces of files that a converted weight is, one behind the other.

    Args:
        converter: the host's.
        sources: the tensors that each of its source patterns matched, in the order in which the host collects them.
        shape: of the weight, as the model has it.

    Returns:
        Empty where the weight is more than its pieces, or would get another shape: the host converts it, or says what is wrong.
    """
    origins = [origin for collected in sources.values() for origin in collected]
    if type(converter) is not WeightConverter or len(converter.target_patterns) != 1:
        return ()
    if set(sources) != set(converter.source_patterns) or len({o.dtype for o in origins}) != 1 or not all(o.nbytes for o in origins):
        return ()
    collected = [[_Value(origin.shape, (origin,)) for origin in sources[pattern]] for pattern in converter.source_patterns]
    value = _converted(collected, converter.operations)
    return value.pieces if value is not None and value.shape == shape else ()


def _converted(collected: Sequence[Sequence[_Value]], operations: Sequence[Any]) -> _Value | None:
    kinds = [type(operation) for operation in operations]
    merges = kinds[:1] == [MergeModulelist]
    if merges:
        merged = [_merged(values, operations[0].dim) for values in collected]
        collected = [[value] for value in merged if value is not None]
        if len(collected) < len(merged):
            return None
    if kinds == [MergeModulelist] and len(collected) == 1:
        return collected[0][0]
    # With one source the host's merge is the last step, and what follows finds nothing under its name.
    if kinds[merges:] == [Concatenate] and (len(collected) > 1 or not merges):
        return _concatenated([value for values in collected for value in values], operations[-1].dim)
    return None


def _merged(values: Sequence[_Value], dim: int) -> _Value | None:
    """What ``torch.stack`` makes of them."""
    if dim != 0 or len({value.shape for value in values}) != 1:
        return None
    return _Value((len(values), *values[0].shape), tuple(piece for value in values for piece in value.pieces))


def _concatenated(values: Sequence[_Value], dim: int) -> _Value | None:
    """What ``torch.cat`` makes of them."""
    shape = values[0].shape
    alike = {(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}
    if not 0 <= dim < len(shape) or len(alike) != 1 or len({len(value.shape) for value in values}) != 1:
        return None
    count = math.prod(shape[:dim])
    shares = [list(_shares(value, count)) for value in values]
    if any(len(share) < count for share in shares):
        return None
    pieces = tuple(piece for row in zip(*shares, strict=True) for share in row for piece in share)
    return _Value((*shape[:dim], sum(value.shape[dim] for value in values), *shape[dim + 1 :]), pieces)


def _shares(value: _Value, count: int) -> Iterator[tuple[Origin, ...]]:
    """Cut a value into equal shares, one for each index of the dimensions before that of a concatenation; none where they are too small."""
    if count == 1:
        yield value.pieces
        return
    cuts = count // len(value.pieces)
    for piece in value.pieces:
        nbytes, elements = piece.nbytes // cuts, math.prod(piece.shape) // cuts
        if cuts == 1:
            yield (piece,)
        elif nbytes >= _LEAST_CUT_BYTES:
            for index in range(cuts):
                yield (Origin(piece.path, piece.offset_bytes + index * nbytes, nbytes, piece.dtype, (elements,)),)
