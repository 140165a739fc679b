"""What a load notes of weights that it leaves unread: where they lie, as a whole or in pieces."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.facts import Limits
from overflowml_core.loading import Loading, Origin, joined

FILES = [Path("a"), Path("b")]


def piece(path: Path, first: int, count: int, dtype: str = "BF16") -> Origin:
    return Origin(path, 2 * first, 2 * count, dtype, (count, 1))


def test_a_weight_in_one_piece_has_an_origin_and_one_in_several_has_none() -> None:
    loading, whole, parted, other = Loading(Limits()), object(), object(), object()
    pieces = (piece(FILES[0], 8, 4), piece(FILES[1], 0, 4))
    loading.defer(whole, pieces[0])
    loading.scatter(parted, iter(pieces))
    assert (loading.origin_of(whole), loading.pieces_of(whole)) == (pieces[0], pieces[:1])
    assert (loading.origin_of(parted), loading.pieces_of(parted)) == (None, pieces)
    assert (loading.origin_of(other), loading.pieces_of(other)) == (None, ())


def test_an_id_that_went_to_another_parameter_is_not_taken_for_the_first() -> None:
    loading, known, other = Loading(Limits()), object(), object()
    loading.scatter(known, [piece(FILES[0], 0, 4)])
    loading.scattered[id(other)] = loading.scattered[id(known)]
    assert loading.pieces_of(other) == ()


def test_pieces_that_follow_each_other_in_a_file_are_one() -> None:
    first, second, third = piece(FILES[0], 0, 4), piece(FILES[0], 4, 6), piece(FILES[0], 10, 2)
    assert joined([first, second, third]) == (Origin(FILES[0], 0, 24, "BF16", (12,)),)
    assert joined([second, first]) == (second, first)
    assert joined([first, third]) == (first, third)
    assert joined([first, piece(FILES[1], 4, 6)]) == (first, piece(FILES[1], 4, 6))
    assert joined([first, piece(FILES[0], 4, 6, "F16")]) == (first, piece(FILES[0], 4, 6, "F16"))
    assert joined([]) == ()


@given(st.lists(st.tuples(st.sampled_from(FILES), st.integers(0, 6), st.integers(0, 4)), max_size=12))
def test_joining_changes_no_byte_and_leaves_nothing_to_join(places: list[tuple[Path, int, int]]) -> None:
    pieces = [piece(*place) for place in places]
    found = joined(pieces)

    def read(origins: tuple[Origin, ...] | list[Origin]) -> list[tuple[Path, int]]:
        return [(o.path, o.offset_bytes + byte) for o in origins for byte in range(o.nbytes)]

    assert read(found) == read(pieces)
    assert joined(found) == found
    assert sum(origin.nbytes for origin in found) == 2 * sum(count for _, _, count in places)
