"""Pictures in a storage: whole, never over another one, and gone on with by what they say of themselves."""

from __future__ import annotations

import hashlib
import uuid

import pytest

pytest.importorskip("fsspec")
pytest.importorskip("PIL")

from PIL import Image

from overflowml_core.cli.running.folder import MANIFEST, Header, png_of
from overflowml_ray.storage import BadStorage, Storage, StorageRun

HEADER = Header({"pipeline": "digest"}, "0" * 64, 3, 7, 1)


@pytest.fixture(params=["file", "memory"])
def storage(request, tmp_path) -> Storage:
    return Storage(f"file://{tmp_path}/deep/out" if request.param == "file" else f"memory://{uuid.uuid4().hex}/out")


def picture(index: int, seed: int | None = None, run: str = HEADER.run) -> bytes:
    return png_of(Image.new("RGB", (4, 4), (index, 0, 0)), {"run": run, "image": index, "seed": 7 + index if seed is None else seed})


def test_a_file_is_put_once(storage):
    assert storage.put_new("00000.png", b"first") == b"first"
    assert storage.put_new("00000.png", b"second") == b"first"
    assert storage.get("00000.png") == b"first"
    assert storage.names() == {"00000.png"}


def test_a_run_goes_on_from_its_manifest(storage):
    run = StorageRun(storage)
    assert (run.header, run.is_empty) == (None, True)
    run.begin(HEADER)
    content = storage.put_new("00000.png", picture(0))
    run.note(0, hashlib.sha256(content).hexdigest(), len(content), 7, (0,))
    run.put_manifest()
    again = StorageRun(storage)
    assert again.header == HEADER
    assert again.done == {0}
    assert not again.is_empty


def test_what_the_manifest_does_not_list_yet_is_known_by_what_it_says(storage):
    StorageRun(storage).begin(HEADER)
    storage.put_new("00001.png", picture(1))
    run = StorageRun(storage)
    assert run.done == set()
    run.adopt([7, 8, 9])
    assert run.done == {1}
    assert StorageRun(storage).done == {1}


def test_a_picture_that_is_gone_is_not_done(storage):
    run = StorageRun(storage)
    run.begin(HEADER)
    run.note(2, "0" * 64, 1, 9, (2,))
    run.put_manifest()
    assert StorageRun(storage).done == set()


@pytest.mark.parametrize("content", [b"no picture", picture(1, run="another"), picture(1, seed=1), picture(2, seed=8)])
def test_a_strangers_picture_is_refused(storage, content):
    StorageRun(storage).begin(HEADER)
    storage.put_new("00001.png", content)
    with pytest.raises(BadStorage, match=r"00001\.png is no picture of this run; move it"):
        StorageRun(storage).adopt([7, 8, 9])


def test_a_file_in_the_way_is_refused_before_anything_is_written(storage):
    storage.put_new("00002.png", b"mine")
    with pytest.raises(BadStorage, match=r"00002\.png is in the way"):
        StorageRun(storage).begin(HEADER)
    assert storage.names() == {"00002.png"}


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"run": 1}', b"\xff", b""])
def test_a_broken_manifest_is_refused(storage, text):
    storage.put(MANIFEST, text)
    with pytest.raises(BadStorage, match="is no manifest"):
        StorageRun(storage)


def test_a_manifest_that_was_changed_is_refused(storage):
    StorageRun(storage).begin(HEADER)
    storage.put(MANIFEST, (storage.get(MANIFEST) or b"").replace(b'"seed": 7', b'"seed": 8'))
    with pytest.raises(BadStorage, match="heading was changed"):
        StorageRun(storage)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadStorage, match="can be written to"):
        StorageRun(Storage(f"file://{tmp_path}/file/out")).begin(HEADER)
    with pytest.raises(BadStorage, match="nosuch"):
        StorageRun(Storage("nosuch://place"))


def test_a_put_that_fails_leaves_nothing(tmp_path, monkeypatch):
    storage = Storage(f"file://{tmp_path}")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.put_new("00000.png", b"content")
    assert list(tmp_path.iterdir()) == []
