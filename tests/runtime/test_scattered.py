"""Weights that lie in several pieces: the same bits from wherever they are read, and what is shown, edited and given back is true."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from overflowml_core.errors import ReadFault
from overflowml_core.facts import Limits, Tier
from overflowml_core.formats import Format, PartSize
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime import source
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.direct import Direct
from overflowml_core.runtime.encode import EncodedWeight, encoded, sources_of
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Slab, lay_out
from overflowml_core.runtime.slab_content import content_of
from overflowml_core.runtime.source import fill, is_straight, stored_as_is, values_of
from overflowml_core.runtime.structure import DTYPE_NAMES, dissect
from tests.runtime.build import PLENTY, job, raw, rows, same, slots_budget, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import call, on_device


def scatter(module: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Loading]:
    """An unread twin whose matrices lie row by row in two files, in reverse order, and its other weights as a whole."""
    twin, loading = copy.deepcopy(module), Loading(Limits())
    folder.mkdir(exist_ok=True)
    paths = [folder / "a.bin", folder / "b.bin"]
    contents = [bytearray(b"head"), bytearray(b"another head")]
    for inner in twin.modules():
        for name, parameter in list(inner._parameters.items()):
            if parameter is None:
                continue
            pieces: list[Origin] = []
            for number, row in reversed(list(enumerate(parameter.data if parameter.dim() > 1 else parameter.data[None]))):
                content = contents[number % 2]
                pieces.insert(0, Origin(paths[number % 2], len(content), row.nbytes, DTYPE_NAMES[row.dtype], tuple(row.shape)))
                content += raw(row)
            empty = nn.Parameter(torch.empty(parameter.shape, device="meta", dtype=dtype or parameter.dtype), requires_grad=False)
            if len(pieces) == 1:
                loading.defer(empty, pieces[0])
            else:
                loading.scatter(empty, pieces)
            inner._parameters[name] = empty
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return twin, loading


def unread_again(module: nn.Module, loading: Loading) -> tuple[nn.Module, Loading]:
    """Another unread twin with the same files."""
    twin, other = copy.deepcopy(module), Loading(Limits())
    for mine, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        other.scatter(mine, loading.pieces_of(theirs))
    return twin, other


def slab_of(module: nn.Module, loading: Loading) -> Slab:
    return lay_out(dissect(module).blocks[0], loading)


@given(data=st.data(), used=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), window_items=st.integers(1, 9))
@settings(max_examples=40)
def test_pieces_anywhere_give_the_same_bits(
    data: st.DataObject, used: torch.dtype, window_items: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    cuts = sorted(data.draw(st.sets(st.integers(1, 19), max_size=6)))
    places = list(zip([0, *cuts], [*cuts, 20], strict=True))
    order = data.draw(st.permutations(range(len(places))))
    path = tmp_path_factory.mktemp("pieces") / "m.bin"
    content, pieces = bytearray(data.draw(st.binary(max_size=5))), {}
    for number in order:
        first, last = places[number]
        pieces[number] = Origin(path, len(content), 4 * (last - first), "F32", (last - first,))
        content += raw(values.flatten()[first:last])
    path.write_bytes(content)
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.empty(4, 5, device="meta", dtype=used), requires_grad=False)
    loading = Loading(Limits())
    loading.scatter(holder.weight, [pieces[number] for number in range(len(places))])
    (entry,) = lay_out(dissect(holder).fixed, loading).entries
    assert is_straight(entry) is (used is torch.float32)
    with pytest.MonkeyPatch.context() as patch, FileReader() as reader:
        patch.setattr(source, "_WINDOW_BYTES", 4 * window_items)
        assert same(values_of(entry, reader), values.to(used))


def test_what_is_converted_is_read_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that RAM never holds a second copy of a stack of experts."""
    module = stack(2, 64)
    twin, loading = scatter(module, tmp_path, torch.bfloat16)
    slab = slab_of(twin, loading)
    asked: list[int] = []

    class Reader(FileReader):
        def read(self, pieces, buffer):  # type: ignore[no-untyped-def]
            asked.append(buffer.numel())
            super().read(pieces, buffer)

    monkeypatch.setattr(source, "_WINDOW_BYTES", 1024)
    buffer = torch.zeros(slab.nbytes, dtype=torch.uint8)
    with Reader() as reader:
        fill(slab.entries, buffer, reader)
    assert asked == [slab.nbytes, *[1024] * 16]  # the first one for what needs no conversion, which is nothing
    assert same(slab.entries[0].view(buffer), module.blocks[0].up.weight.bfloat16())


@pytest.mark.parametrize(("tier", "dtype"), [("pinned", None), ("ram", torch.float64), ("disk", None), ("disk", torch.float64)])
def test_a_streamed_model_computes_the_same_and_shows_true_weights(
    tier: str, dtype: torch.dtype | None, tmp_path: Path, vgpu: Virtual
) -> None:
    module = stack(4, 16, hidden=24, bias=True, ends=True)
    reference = copy.deepcopy(module).to(dtype or torch.float32)
    x = rows().to(dtype or torch.float32)
    expected = on_device(reference, x)
    twin, loading = scatter(module, tmp_path / "model", dtype)
    engine = job(twin, vgpu.device, budget_bytes=slots_budget(twin, 2, 1), tier=tier, loading=loading).attach(tmp_path / "store")
    assert {p.home for p in engine.plan.phases[0].streamed} == {Tier(tier)}
    for _ in range(2):
        assert same(call(twin, x), expected)
    assert_true(twin, reference)
    engine.detach()
    assert_true(twin, reference)
    assert {p.device.type for p in twin.parameters()} == {"cpu"}


def assert_true(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert same(mine, other), name


def test_on_the_cpu_a_slab_in_pieces_is_packed_once_and_kept(tmp_path: Path) -> None:
    module = stack(4, 16, bias=True)
    expected = module(rows())
    twin, loading = scatter(module, tmp_path / "model")
    assert not stored_as_is(slab_of(twin, loading))
    kept: list[set[tuple[str, int]]] = []
    for each, known in ((twin, loading), unread_again(twin, loading)):
        with job(each, loading=known).attached(tmp_path / "store") as engine:
            assert {p.home for p in engine.plan.phases[0].streamed} == {Tier.DISK}
            assert same(each(rows()), expected)
            assert_true(each, module)
            kept.append({(path.name, path.stat().st_ino) for path in (tmp_path / "store").glob("*.slab")})
    assert len(kept[0]) == 4
    assert kept[1] == kept[0]


def test_an_edited_weight_is_not_read_from_its_pieces_again(tmp_path: Path) -> None:
    module = stack(4, 16)
    twin, loading = scatter(module, tmp_path / "model")
    with job(twin, loading=loading).attached(tmp_path / "store") as engine:
        for each in (twin, module):
            with engine.editing(twin.blocks[1]), torch.no_grad():
                each.blocks[1].up.weight.mul_(2)
        assert same(twin(rows()), module(rows()))
        assert_true(twin, module)
    assert_true(twin, module)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("where", ["cpu", "vgpu"])
def test_a_model_that_fits_is_read_in_whole(where: str, dtype: torch.dtype | None, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(3, ends=True)
    twin, loading = scatter(module, tmp_path, dtype)
    task = job(twin, HostDevice() if where == "cpu" else vgpu.device, budget_bytes=PLENTY, loading=loading)
    plan = task.plan()
    assert not plan.managed
    Direct(plan, task.network, task.device).attach(task.modules, loading)
    assert {p.device.type for p in twin.parameters()} == {where}
    assert_true(twin.cpu(), module.to(dtype or torch.float32))


def test_the_content_of_a_slab_depends_on_every_piece(tmp_path: Path) -> None:
    twin, loading = scatter(stack(2, 16), tmp_path)
    slab = slab_of(twin, loading)
    (entry,) = slab.entries
    first, second, *rest = entry.scattered
    others = [
        replace(slab, entries=(replace(entry, scattered=pieces),))
        for pieces in (
            (second, first, *rest),
            (first, first, *rest),
            (replace(first, dtype="I32"), second, *rest),
            (replace(first, path=second.path), second, *rest),
        )
    ]
    with FileReader() as reader:
        contents = [content_of(each, reader) for each in (slab, *others)]
        again = content_of(slab_of(twin, loading), reader)
    keys = [content.key for content in contents if content is not None]
    assert len(set(keys)) == len(others) + 1
    assert again is not None
    assert again.key == keys[0]
    assert {path.name for path, _ in again.stamps} == {"a.bin", "b.bin"}


def test_a_converted_weight_is_made_from_its_pieces(tmp_path: Path) -> None:
    class Halves:
        """Rounds to half precision: a format that a plain tensor can be in."""

        format = Format("half", 16, "minimal", 0.0, parts=(PartSize(16),))
        version = "1"

        def encode(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.half()

        def template(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=torch.float16, device="meta")

    module = stack(2, 16)
    twin, loading = scatter(module, tmp_path)
    (unit, _) = encoded(dissect(twin), {"blocks.0": "half"}, {"half": Halves()}, loading).blocks
    slab = lay_out(unit, loading)
    assert isinstance(slab.entries[0].weight, EncodedWeight)
    assert len(sources_of(slab.entries[0])) == 16
    buffer = torch.zeros(slab.nbytes, dtype=torch.uint8)
    with FileReader() as reader:
        fill(slab.entries, buffer, reader)
    assert same(slab.entries[0].view(buffer), module.blocks[0].up.weight.half())


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_piece_that_is_gone_is_a_fault_that_names_its_file(damage: str, tmp_path: Path) -> None:
    twin, loading = scatter(stack(2, 16), tmp_path)
    (entry,) = slab_of(twin, loading).entries
    path = tmp_path / "b.bin"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with FileReader() as reader, pytest.raises(ReadFault) as caught:
        fill([entry], torch.zeros(entry.nbytes, dtype=torch.uint8), reader)
    assert caught.value.path == path
