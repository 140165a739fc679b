"""What text means: what exists is a path, what looks like a size is one, and the rest may be on the Hub."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from overflowml_core import sources
from overflowml_core.errors import BadCheckpoint, BadSize, NotAModel
from overflowml_core.facts import Network, Workload
from overflowml_core.sources import Place, is_loadable, of_text


def _safetensors(path: Path) -> Path:
    header = json.dumps({"layers.0.weight": {"dtype": "BF16", "shape": [64, 64], "data_offsets": [0, 8192]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8192))
    return path


@pytest.fixture
def hub(monkeypatch):
    """Asks no network: notes what would have been asked."""
    asked = []
    monkeypatch.setattr(sources, "_of_hub", lambda source, folder: asked.append(source) or Place(Path("fetched"), source))
    return asked


@pytest.mark.parametrize("source", ["40", "40GB", " 37.5 GiB ", 40, 40.5])
def test_a_size_is_a_size(source, tmp_path):
    network = of_text(source, Workload(), tmp_path)
    assert isinstance(network, Network)
    assert network.weight_bytes > 30e9
    assert not is_loadable(source)


@pytest.mark.parametrize("source", ["0", "-3", "nan", "inf", "1e99", "40XB", "40 gigs", 0, float("nan"), True, "."])
def test_a_size_that_is_none_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == ".":
        assert of_text(source, Workload(), tmp_path) == Place(Path("."))
        return
    with pytest.raises((BadSize, NotAModel)):
        of_text(source, Workload(), tmp_path)


_NOTHING = ("forty", "", "no such", "/no/such/folder", "./missing", "missing.gguf", "owner/name/../x", "a" * 5000, "a\0b")


@pytest.mark.parametrize("source", _NOTHING)
def test_what_is_nothing_is_no_model(source, tmp_path, hub):
    with pytest.raises(NotAModel) as caught:
        of_text(source, Workload(), tmp_path)
    assert "\n" not in str(caught.value)
    assert hub == []


@pytest.mark.parametrize("source", ["owner/name", "owner/name@main", "black-forest-labs/FLUX.1-dev", "owner/name/transformer"])
def test_an_id_is_looked_for_on_the_hub(source, tmp_path, hub):
    assert of_text(source, Workload(), tmp_path).name == source
    assert hub == [source]
    assert is_loadable(source)


def test_a_path_that_exists_comes_first(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "40").mkdir()
    assert of_text("owner/name", Workload(), tmp_path) == Place(Path("owner/name"))
    assert of_text("40", Workload(), tmp_path) == Place(Path("40"))
    assert hub == []


def test_files_by_their_headers(tmp_path):
    network = of_text(_safetensors(tmp_path / "model.safetensors"), Workload(), tmp_path)
    assert isinstance(network, Network)
    assert network.weight_bytes == 8192
    assert not is_loadable(tmp_path / "model.safetensors")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(BadCheckpoint, match=r"cut\.gguf"):
        of_text(tmp_path / "cut.gguf", Workload(), tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(NotAModel, match="neither GGUF nor safetensors"):
        of_text(tmp_path / "notes.txt", Workload(), tmp_path)


def test_a_folder_of_weights_alone_is_planned_by_their_headers(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    assert of_text(folder, Workload(), tmp_path) == Place(folder)
    _safetensors(folder / "model.safetensors")
    assert isinstance(of_text(folder, Workload(), tmp_path), Network)
    assert not is_loadable(folder)
    (folder / "config.json").write_text("{}")
    assert of_text(folder, Workload(), tmp_path) == Place(folder)
    assert is_loadable(folder)
