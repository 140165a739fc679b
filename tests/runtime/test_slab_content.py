"""Keys of packed slabs: the same for the same content, wherever it lies, and another one for whatever might be other content."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from overflowml_core.codec import Codec
from overflowml_core.loading import Origin
from overflowml_core.runtime import slab_content
from overflowml_core.runtime.encode import EncodedWeight
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Entry, Slab, lay_out
from overflowml_core.runtime.slab_content import Content, content_of
from overflowml_core.runtime.structure import dissect
from tests.runtime.build import on_meta, save, stack

NBYTES = 300_000
"""Of each weight: the middle is in none of the samples."""


@pytest.fixture(params=["settled", "just changed"])
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether files count as changed long ago, or just now."""
    monkeypatch.setattr(slab_content, "_SETTLED_NS", -(10**18) if request.param == "settled" else 10**18)
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "model" / "m.safetensors"
    made.parent.mkdir()
    made.write_bytes(bytes(range(256)) * 4000)
    return made


def slab_of(path: Path, dtype: torch.dtype = torch.float32, start: int = 1024) -> Slab:
    unit = dissect(stack(2, 16, bias=True)).blocks[0]
    entries = []
    for number, weight in enumerate(unit.weights):
        origin = Origin(path, start + number * NBYTES, NBYTES, "BF16", (NBYTES // 2,))
        entries.append(Entry(weight, number * 4 * NBYTES, NBYTES // 2 * dtype.itemsize, (NBYTES // 2,), (1,), dtype, origin))
    return Slab(unit, tuple(entries), 8 * NBYTES)


def found(slab: Slab, recipe: str = "cast") -> Content:
    with FileReader() as reader:
        content = content_of(slab, reader, recipe)
    assert content is not None
    return content


def test_the_same_files_have_the_same_key_wherever_they_are(path: Path, state: str) -> None:
    before = found(slab_of(path))
    assert (len(before.key), before.title.source, before.title.block, before.title.form) == (64, str(path.parent), "blocks.0", "float32")
    assert found(slab_of(path)).key == before.key
    os.rename(path.parent, path.parent.with_name("other"))
    moved = found(slab_of(path.parent.with_name("other") / path.name))
    assert (moved.key, moved.title.source) == (before.key, str(path.parent.with_name("other")))


def test_whatever_the_slab_depends_on_is_in_the_key(path: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slab = slab_of(path)
    first, *rest = slab.entries
    assert first.origin is not None
    changed = [
        slab_of(path, torch.float64),
        slab_of(path, start=1026),
        replace(slab, entries=(replace(first, offset_bytes=512), *rest)),
        replace(slab, entries=(replace(first, stride=(2,)), *rest)),
        replace(slab, entries=(replace(first, shape=(NBYTES // 4, 2)), *rest)),
        replace(slab, entries=(replace(first, path=("scale",)), *rest)),
        replace(slab, entries=(replace(first, weight=replace(first.weight, name="other")), *rest)),
        replace(slab, entries=(replace(first, origin=replace(first.origin, dtype="F16")), *rest)),
        replace(slab, entries=(*rest, first)),
        replace(slab, entries=(first,)),
        replace(slab, nbytes=slab.nbytes + 512),
    ]
    keys = [found(slab).key, found(slab, "int8:torchao-0.18").key, *(found(other).key for other in changed)]
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(found(slab).key)
    assert len(set(keys)) == len(keys)


def _write(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xfe\xfd")


def _keep_time(path: Path, offset: int) -> None:
    before = path.stat()
    _write(path, offset)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace_with_a_copy(path: Path, offset: int) -> None:
    before = path.stat()
    other = path.with_name("copy")
    other.write_bytes(path.read_bytes())
    _write(other, offset)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


CHANGES = {"written": _write, "written, and its time set back": _keep_time, "replaced, and its time set": _replace_with_a_copy}


@pytest.mark.parametrize("offset", [0, 1024, 1024 + NBYTES // 2, 1024 + NBYTES, 1024 + 2 * NBYTES - 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_has_another_key(change: str, offset: int, path: Path, state: str) -> None:
    if sys.platform == "win32" and state == "settled" and offset == 1024 + NBYTES // 2 and change != "written":
        pytest.skip("there is no time of the last change of any kind")
    slab = slab_of(path)
    with FileReader() as reader:
        before = content_of(slab, reader)
        assert before is not None
        assert before.holds_in(reader)
        time.sleep(0.02)  # a tick of the clock
        CHANGES[change](path, offset)
        assert not before.holds_in(reader)  # even where it was replaced: that the old one has no name any more is a change
    assert found(slab).key != before.key


@pytest.mark.skipif(sys.platform == "win32", reason="there is no time of the last change of any kind")
def test_two_changes_within_a_tick_of_the_clock_are_told_apart(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the second write had left all that the system reports as it was: the bytes themselves must tell."""
    stamp = (path.stat().st_size, 1, path.stat().st_mtime_ns, 1)
    monkeypatch.setattr(slab_content, "_stamp", lambda reader, path: stamp)
    before = found(slab_of(path))
    _write(path, 1024 + NBYTES // 2)
    assert found(slab_of(path)).key != before.key


def test_weights_that_are_in_memory_alone_have_none(tmp_path: Path) -> None:
    module = stack(2, 16, bias=True)
    file = save(dict(module.named_parameters()), tmp_path / "m.safetensors")
    twin, loading = on_meta(module, file)
    unit = dissect(twin).blocks[0]
    unit.weights[0].owners[0].module._parameters["weight"] = module.blocks[0].up.weight
    with FileReader() as reader:
        assert content_of(lay_out(dissect(module).blocks[0], None), reader) is None
        assert content_of(lay_out(dissect(twin).blocks[0], loading), reader) is None
        assert content_of(lay_out(dissect(twin).blocks[1], loading), reader) is not None


def test_converted_weights_count_by_their_file_until_somebody_edits_them(path: Path) -> None:
    plain = slab_of(path).entries[0]
    for values, is_known in ((torch.empty(1, device="meta"), True), (torch.ones(1), False)):
        weight = EncodedWeight(
            "w", torch.nn.Parameter(values, False), (), plain=plain, device=torch.device("cpu"), codec=cast("Codec", None)
        )
        slab = Slab(slab_of(path).unit, (replace(plain, weight=weight, origin=None),), 2 * NBYTES)
        with FileReader() as reader:
            assert (content_of(slab, reader, "int8:1") is not None) == is_known
