"""Broken files and senseless requests: one line that names the file or value and the way out, and nothing left behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import transformers as tf

import overflowml
from overflowml_core.errors import BadCheckpoint, NotAModel, OverflowmlError, UnsafeCheckpoint
from tests.hosts import pipelines
from tests.hosts.check import assert_one_line, copy_folder, smallest

Saved = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")
_NO_TOKENS = pipelines.without_tokenizers("flux")
_EXACT = overflowml.Limits.exactly(device_memory=100_000, reserve=0)


# ---- each kind of damage does something to one folder of weights, and returns the name that the message must hold


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


def _index(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


def _missing_shard(folder: Path) -> str:
    _shards(folder)[1].unlink()
    return "00002-of-"


def _truncated_shard(folder: Path) -> str:
    shard = _shards(folder)[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def _empty_shard(folder: Path) -> str:
    _shards(folder)[0].write_bytes(b"")
    return _shards(folder)[0].name


def _rewrite_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def _offsets_that_lie(folder: Path) -> str:
    def change(header: dict[str, Any]) -> None:
        entry = next(value for name, value in header.items() if name != "__metadata__")
        entry["data_offsets"][1] += 1_000_000

    _rewrite_header(_shards(folder)[0], change)
    return _shards(folder)[0].name


def _shape_that_lies(folder: Path) -> str:
    def change(header: dict[str, Any]) -> None:
        entry = next(value for name, value in header.items() if name != "__metadata__")
        entry["shape"] = [7, *entry["shape"]]

    _rewrite_header(_shards(folder)[0], change)
    return _shards(folder)[0].name


def _header_of_noise(folder: Path) -> str:
    _shards(folder)[0].write_bytes(b"\xff" * 4096)
    return _shards(folder)[0].name


def _change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    document = json.loads(_index(folder).read_text())
    change(document["weight_map"])
    _index(folder).write_text(json.dumps(document))


def _index_names_a_missing_file(folder: Path) -> str:
    _change_index(folder, lambda names: names.update({next(iter(names)): "model-00099-of-00099.safetensors"}))
    return "model-00099-of-00099.safetensors"


def _index_names_a_missing_tensor(folder: Path) -> str:
    _change_index(folder, lambda names: names.update({"nobody.knows.this": _shards(folder)[0].name}))
    return "nobody.knows.this"


def _index_leads_out_of_the_folder(folder: Path) -> str:
    _change_index(folder, lambda names: names.update({next(iter(names)): "../../secret.safetensors"}))
    return "secret"


def _index_of_noise(folder: Path) -> str:
    _index(folder).write_text("{")
    return _index(folder).name


def _only_pickle(folder: Path) -> str:
    for path in [*_shards(folder), _index(folder)]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return "pytorch_model.bin"


def _no_weights(folder: Path) -> str:
    for path in [*_shards(folder), _index(folder)]:
        path.unlink()
    return folder.name


_DAMAGES = [
    _missing_shard,
    _truncated_shard,
    _empty_shard,
    _offsets_that_lie,
    _shape_that_lies,
    _header_of_noise,
    _index_names_a_missing_file,
    _index_names_a_missing_tensor,
    _index_leads_out_of_the_folder,
    _index_of_noise,
    _only_pickle,
    _no_weights,
]


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_transformers_folder(damage: Callable[[Path], str], saved: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved("llama", max_shard_size="40KB"), tmp_path)
    name = damage(folder)
    describe = (lambda: overflowml.plan(folder), lambda: overflowml.describe(folder))
    for ask in (
        # A configuration alone can be described: its model is planned for before it is downloaded.
        *(describe if damage is not _no_weights else ()),
        lambda: tf.AutoModelForCausalLM.from_pretrained(folder, overflow=True),
        lambda: tf.LlamaForCausalLM.from_pretrained(str(folder), overflow=_EXACT),
        lambda: tf.AutoModel.from_pretrained(folder, device_map="overflowml"),
        lambda: tf.pipeline("text-generation", model=str(folder), device_map="overflowml"),
    ):
        with pytest.raises((BadCheckpoint, NotAModel)) as caught:
            ask()
        assert_one_line(caught.value, name)
        assert isinstance(caught.value, UnsafeCheckpoint) == (damage is _only_pickle)


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_damaged_diffusers_folder(damage: Callable[[Path], str], part: str, saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved_pipeline("flux", max_shard_size="20KB"), tmp_path)
    name = damage(folder / part)
    for ask in (
        lambda: overflowml.plan(folder, **_NO_TOKENS),
        lambda: df.DiffusionPipeline.from_pretrained(folder, overflow=True, **_NO_TOKENS),
        lambda: df.FluxPipeline.from_pretrained(str(folder), overflow=_EXACT, **_NO_TOKENS),
    ):
        with pytest.raises((BadCheckpoint, NotAModel)) as caught:
            ask()
        assert_one_line(caught.value, name, part)
    if part == "transformer":
        for ask in (
            lambda: overflowml.describe(folder / part),
            lambda: df.FluxTransformer2DModel.from_pretrained(folder / part, overflow=True),
            lambda: df.FluxTransformer2DModel.from_pretrained(folder, subfolder=part, overflow=True),
            lambda: df.AutoModel.from_pretrained(str(folder / part), overflow=True),
        ):
            with pytest.raises((BadCheckpoint, NotAModel)) as caught:
                ask()
            assert_one_line(caught.value, name)


def test_component_folder_that_is_missing(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved_pipeline("flux"), tmp_path)
    for path in (folder / "vae").iterdir():
        path.unlink()
    (folder / "vae").rmdir()
    for ask in (
        lambda: overflowml.plan(folder, **_NO_TOKENS),
        lambda: df.FluxPipeline.from_pretrained(folder, overflow=True, **_NO_TOKENS),
    ):
        with pytest.raises(BadCheckpoint) as caught:
            ask()
        assert_one_line(caught.value, "vae", "AutoencoderKL", "model_index.json")
    vae = df.AutoencoderKL.from_pretrained(saved_pipeline("flux") / "vae")
    pipe = df.FluxPipeline.from_pretrained(folder, vae=vae, overflow=smallest(saved_pipeline("flux"), **_NO_TOKENS), **_NO_TOKENS)
    overflowml.release(pipe)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"_class_name": "FluxPipeline"}', '{"_class_name": 3}', '{"_class_name": "NoSuchPipeline"}']
)
def test_model_index_of_noise(text: str, saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved_pipeline("flux"), tmp_path)
    (folder / "model_index.json").write_text(text)
    with pytest.raises(OverflowmlError) as caught:
        overflowml.plan(folder, **_NO_TOKENS)
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model_type": "llama"}',
        '{"architectures": ["NoSuchModel"], "model_type": "llama"}',
        '{"model_type": "nothing_like_it"}',
    ],
)
def test_config_of_noise(text: str, saved: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved("llama"), tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(OverflowmlError) as caught:
        overflowml.plan(folder)
    assert_one_line(caught.value, tmp_path.name)


# ---- places that hold no model


def _nowhere(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("nothing")
    (tmp_path / "file.safetensors").write_bytes(b"x" * 100)
    return {name: tmp_path / name for name in ("empty", "text", "file.safetensors", "missing", "missing/deeper")}


@pytest.mark.parametrize("name", ["empty", "text", "file.safetensors", "missing", "missing/deeper"])
@pytest.mark.parametrize("as_text", [False, True])
def test_place_without_a_model(name: str, as_text: bool, tmp_path: Path) -> None:
    place: Any = _nowhere(tmp_path)[name]
    shown = place.name
    place = str(place) if as_text else place
    asks: list[Callable[[], Any]] = [
        lambda: overflowml.plan(place),
        lambda: overflowml.describe(place),
        lambda: tf.LlamaForCausalLM.from_pretrained(place, overflow=True),
        lambda: df.DiffusionPipeline.from_pretrained(place, overflow=True),
        lambda: df.FluxPipeline.from_pretrained(place, overflow=True),
        lambda: df.UNet2DConditionModel.from_pretrained(place, overflow=True),
    ]
    for ask in asks:
        # A single file can be planned for, where it is sound.
        with pytest.raises((NotAModel, BadCheckpoint) if place and Path(place).is_file() else NotAModel) as caught:
            ask()
        assert_one_line(caught.value, shown)


@pytest.mark.parametrize("source", [3 + 1j, None, object(), b"bytes", ["a"]])
def test_source_of_another_type(source: object) -> None:
    for ask in (overflowml.describe, overflowml.plan, overflowml.manage):
        with pytest.raises(NotAModel) as caught:
            ask(source)
        assert_one_line(caught.value)
