"""Folders as transformers and diffusers write them, and as they should not be."""

import json
import os
import pickle

import pytest

from overflowml_core.errors import BadCheckpoint, NotAModel, UnsafeCheckpoint
from overflowml_core.inspect import checkpoint
from overflowml_core.inspect.checkpoint import checkpoint_of_files, find_weights, kind_of_folder, open_checkpoint, read_json

numpy = pytest.importorskip("numpy")
save_file = pytest.importorskip("safetensors.numpy").save_file

TRANSFORMERS = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
DIFFUSERS = {"_class_name": "FluxTransformer2DModel"}


def save(path, *names):
    save_file({name: numpy.zeros((2, 2), dtype=numpy.float32) for name in names}, path)
    return path


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def shard(folder, stem="model", index="{stem}.safetensors.index.json", **extra):
    save(folder / f"{stem}-00001-of-00002.safetensors", "a", "b")
    save(folder / f"{stem}-00002-of-00002.safetensors", "c")
    weight_map = {
        "a": f"{stem}-00001-of-00002.safetensors",
        "b": f"{stem}-00001-of-00002.safetensors",
        "c": f"{stem}-00002-of-00002.safetensors",
    }
    return write_json(folder / index.format(stem=stem), {"metadata": {"total_size": 48}, "weight_map": {**weight_map, **extra}})


@pytest.mark.parametrize(
    ("config", "stem"),
    [(TRANSFORMERS, "model"), (DIFFUSERS, "diffusion_pytorch_model"), (None, "model"), (None, "diffusion_pytorch_model")],
)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_single_file(tmp_path, config, stem, variant):
    if config:
        write_json(tmp_path / "config.json", config)
    path = save(tmp_path / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"), "a", "b")
    found = open_checkpoint(tmp_path, variant)
    assert found.folder == tmp_path
    assert found.files == (path,)
    assert set(found.tensors) == {"a", "b"}
    assert found.tensors["a"].path == path
    assert found.tensors["a"].entry.shape == (2, 2)


@pytest.mark.parametrize(
    ("stem", "index", "variant"),
    [
        ("model", "{stem}.safetensors.index.json", None),
        ("model", "{stem}.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model", "{stem}.safetensors.index.json", None),
        ("diffusion_pytorch_model", "{stem}.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model", "{stem}.safetensors.fp16.index.json", "fp16"),
    ],
)
def test_shards(tmp_path, stem, index, variant):
    shard(tmp_path, stem, index)
    found = open_checkpoint(tmp_path, variant)
    assert [path.name for path in found.files] == [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"]
    assert {name: located.path.name[-22:] for name, located in found.tensors.items()} == {
        "a": "1-of-00002.safetensors",
        "b": "1-of-00002.safetensors",
        "c": "2-of-00002.safetensors",
    }


@pytest.mark.parametrize("config", [TRANSFORMERS, DIFFUSERS], ids=["transformers takes the file", "diffusers takes the index"])
def test_file_and_index_together_are_settled_as_in_the_host(tmp_path, config):
    write_json(tmp_path / "config.json", config)
    stem = "model" if config is TRANSFORMERS else "diffusion_pytorch_model"
    shard(tmp_path, stem)
    save(tmp_path / f"{stem}.safetensors", "single")
    assert set(open_checkpoint(tmp_path).tensors) == ({"single"} if config is TRANSFORMERS else {"a", "b", "c"})


@pytest.mark.parametrize(("config", "name"), [(DIFFUSERS, "model.safetensors"), (TRANSFORMERS, "diffusion_pytorch_model.safetensors")])
def test_names_that_the_host_would_not_load_are_not_taken(tmp_path, config, name):
    write_json(tmp_path / "config.json", config)
    save(tmp_path / name, "a")
    with pytest.raises(NotAModel, match=name):
        open_checkpoint(tmp_path)


def test_configured_name_comes_first(tmp_path):
    write_json(tmp_path / "config.json", {**TRANSFORMERS, "transformers_weights": "other.safetensors"})
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "other.safetensors", "b")
    assert set(open_checkpoint(tmp_path).tensors) == {"b"}


def test_configured_name_stays_in_the_folder(tmp_path):
    write_json(tmp_path / "config.json", {**TRANSFORMERS, "transformers_weights": "../other.safetensors"})
    with pytest.raises(BadCheckpoint, match="no plain file name"):
        open_checkpoint(tmp_path)


def test_symbolic_links_are_followed_as_the_hub_cache_needs(tmp_path):
    blob = save(tmp_path / "blob", "a")
    (tmp_path / "snapshot").mkdir()
    try:
        os.symlink(blob, tmp_path / "snapshot" / "model.safetensors")
    except OSError:
        pytest.skip("no symbolic links here")
    assert set(open_checkpoint(tmp_path / "snapshot").tensors) == {"a"}


def test_missing_variant_says_what_there_is(tmp_path):
    save(tmp_path / "model.safetensors", "a")
    assert find_weights(tmp_path, "fp16") is None
    with pytest.raises(NotAModel, match=r"variant 'fp16'.*'model\.safetensors'"):
        open_checkpoint(tmp_path, "fp16")


def test_missing_folder(tmp_path):
    with pytest.raises(NotAModel, match="no such folder"):
        open_checkpoint(tmp_path / "none")


def test_file_instead_of_folder(tmp_path):
    with pytest.raises(NotAModel, match="it is a file"):
        open_checkpoint(save(tmp_path / "model.safetensors", "a"))


def test_empty_folder(tmp_path):
    with pytest.raises(NotAModel, match=r"looked for model\.safetensors and diffusion_pytorch_model\.safetensors"):
        open_checkpoint(tmp_path)


def test_pipeline_folder_points_to_its_components(tmp_path):
    write_json(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
    save(tmp_path / "model.safetensors", "a")
    with pytest.raises(NotAModel, match="component folders"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt", "x.pth", "x.ckpt"]
)
@pytest.mark.parametrize("config", [TRANSFORMERS, DIFFUSERS, None])
def test_only_pickle_is_unsafe_and_says_how_to_convert(tmp_path, name, config):
    if config:
        write_json(tmp_path / "config.json", config)
    (tmp_path / name).write_bytes(pickle.dumps({}))
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(UnsafeCheckpoint, match="save_pretrained") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == tmp_path / name


def test_what_a_trainer_leaves_is_no_weights(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(NotAModel) as caught:
        open_checkpoint(tmp_path)
    assert not isinstance(caught.value, UnsafeCheckpoint)


def test_pickle_beside_safetensors_is_left_alone(tmp_path):
    save(tmp_path / "model.safetensors", "a")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


def test_index_names_a_missing_file(tmp_path):
    shard(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="says that it holds 2 tensors") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path.name == "model-00001-of-00002.safetensors"


def test_index_names_a_tensor_that_no_file_holds(tmp_path):
    shard(tmp_path, ghost="model-00002-of-00002.safetensors")
    with pytest.raises(BadCheckpoint, match=r"does not hold tensor 'ghost'.*no file does"):
        open_checkpoint(tmp_path)


def test_index_names_the_wrong_file_of_a_tensor(tmp_path):
    shard(tmp_path, c="model-00001-of-00002.safetensors", d="model-00002-of-00002.safetensors")
    save(tmp_path / "model-00002-of-00002.safetensors", "c", "d")
    with pytest.raises(BadCheckpoint, match=r"'c'.*model-00002-of-00002\.safetensors does"):
        open_checkpoint(tmp_path)


def test_tensor_that_the_index_forgot_is_there(tmp_path):
    shard(tmp_path)
    save(tmp_path / "model-00002-of-00002.safetensors", "c", "forgotten")
    assert "forgotten" in open_checkpoint(tmp_path).tensors


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "C:a.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
    ],
)
def test_index_leads_out_of_its_folder(tmp_path, name):
    shard(tmp_path, x=name)
    with pytest.raises(BadCheckpoint, match="no plain file name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [None, 1, ["a.safetensors"], {}, True])
def test_index_names_no_text(tmp_path, name):
    shard(tmp_path, x=name)
    with pytest.raises(BadCheckpoint, match="where a file name belongs"):
        open_checkpoint(tmp_path)


def test_index_of_pickles_is_unsafe(tmp_path):
    shard(tmp_path, x="pytorch_model-00001.bin")
    with pytest.raises(UnsafeCheckpoint):
        open_checkpoint(tmp_path)


def test_index_names_another_kind_of_file(tmp_path):
    shard(tmp_path, x="config.json")
    with pytest.raises(BadCheckpoint, match="no safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_index_without_weights(tmp_path, index):
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(BadCheckpoint, match="weight_map"):
        open_checkpoint(tmp_path)


def test_damaged_shard_is_named(tmp_path):
    shard(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match="cut short") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == path


def test_explicit_files(tmp_path):
    files = [save(tmp_path / "b.safetensors", "b"), save(tmp_path / "a.safetensors", "a")]
    found = checkpoint_of_files([*files, files[0]])
    assert [path.name for path in found.files] == ["a.safetensors", "b.safetensors"]
    assert found.tensors["b"].path == files[0]


def test_tensor_in_two_files(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"'x' is in a\.safetensors too"):
        checkpoint_of_files([save(tmp_path / "a.safetensors", "x"), save(tmp_path / "b.safetensors", "x")])


def test_no_files_at_all():
    with pytest.raises(NotAModel):
        checkpoint_of_files([])


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (TRANSFORMERS, "transformers"),
        ({"model_type": "t5"}, "transformers"),
        (DIFFUSERS, "diffusers-model"),
        ({"x": 1}, None),
        (None, None),
    ],
)
def test_kind_of_folder(tmp_path, config, kind):
    if config is not None:
        write_json(tmp_path / "config.json", config)
    assert kind_of_folder(tmp_path) == kind
    write_json(tmp_path / "model_index.json", {})
    assert kind_of_folder(tmp_path) == "diffusers-pipeline"


def test_kind_of_a_missing_folder(tmp_path):
    assert kind_of_folder(tmp_path / "none") is None


def test_json_as_the_hosts_read_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"limit": Infinity, "é": [1]}', encoding="utf-8")
    assert read_json(path) == {"limit": float("inf"), "é": [1]}


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a":\xff}', "not JSON"),
        (b"[1]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a":"' + b"x" * 300_000 + b'"}', "longer than 250000 bytes"),
    ],
)
def test_bad_json(tmp_path, raw, word):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(BadCheckpoint, match=word) as caught:
        read_json(path, limit_bytes=250_000)
    assert "\n" not in str(caught.value)


def test_missing_json(tmp_path):
    with pytest.raises(BadCheckpoint, match="no such file"):
        read_json(tmp_path / "config.json")


def test_index_may_be_longer_than_other_json(tmp_path, monkeypatch):
    limits = {}

    def recording(path, limit_bytes=checkpoint.JSON_LIMIT_BYTES):
        limits[path.name] = limit_bytes
        return read_json(path, limit_bytes)

    monkeypatch.setattr(checkpoint, "read_json", recording)
    write_json(tmp_path / "config.json", TRANSFORMERS)
    shard(tmp_path)
    open_checkpoint(tmp_path)
    assert limits == {"config.json": 16 * 2**20, "model.safetensors.index.json": 128 * 2**20}
