"""A repository is described by its configurations and headers; no weights file is fetched, and every failure is one line, at once."""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants

from overflowml_core.errors import BadCheckpoint, NotAModel, OverflowmlError, UnsafeCheckpoint
from overflowml_core.inspect import hub as hub_module
from overflowml_core.inspect.hub import fetch_description, split_hub_id

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)
safetensors_file = hub_server.safetensors_file

LARGE = {"w": ("BF16", (1000, 1000), 2), "b": ("F32", (10,), 4)}
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()


def use(endpoint, monkeypatch):
    """What HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.serve() as server:
        use(server.endpoint, monkeypatch)
        yield server


def describe(hub, cache, repo_id="owner/name", revision=None, subfolder=""):
    assert hub.endpoint == constants.ENDPOINT  # no test leaves this machine
    return fetch_description(repo_id, revision, cache, subfolder)


def test_a_language_model_is_described_without_its_weights(hub, tmp_path):
    hub.repositories["owner/name"] = {"config.json": CONFIG, "model.safetensors": safetensors_file(LARGE), "tokenizer.json": b"x" * 10**6}
    found = describe(hub, tmp_path)
    assert found.weight_bytes_by_component == {"model": 2_000_040}
    assert found.dtype_by_component == {"model": "BF16"}
    assert found.files == ("model.safetensors",)
    assert found.commit == hub_server.COMMIT
    assert sorted(p.name for p in found.folder.rglob("*") if p.is_file()) == ["config.json"]
    assert hub.sent_bytes < 200_000


def test_no_more_is_read_than_asked_for_when_a_server_ignores_ranges(hub, tmp_path):
    hub.honours_ranges = False
    hub.repositories["owner/name"] = {"config.json": CONFIG, "model.safetensors": safetensors_file({"w": ("BF16", (5000, 5000), 2)})}
    read = []
    real = hub_module.HubClient.beginning
    hub_module.HubClient.beginning = lambda *args: read.append(real(*args)) or read[-1]
    try:
        assert describe(hub, tmp_path).weight_bytes_by_component == {"model": 50_000_000}
    finally:
        hub_module.HubClient.beginning = real
    assert max(len(part.raw) for part in read) <= 2**17


def test_a_pipeline_is_described_by_component(hub, tmp_path):
    index = {
        "_class_name": "P",
        "transformer": ["diffusers", "T"],
        "vae": ["diffusers", "V"],
        "scheduler": ["diffusers", "S"],
        "safety": None,
    }
    shards = {
        f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors": safetensors_file({f"w{i}": ("BF16", (8, 4), 2)})
        for i in (1, 2)
    }
    names = [name.partition("/")[2] for name in shards]
    hub.repositories["owner/name"] = {
        "model_index.json": json.dumps(index).encode(),
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(
            {"weight_map": dict(zip(("w1", "w2"), names, strict=True))}
        ).encode(),
        **shards,
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.fp16.safetensors": safetensors_file({"w": ("F16", (3,), 2)}),
        "vae/diffusion_pytorch_model.safetensors": safetensors_file({"w": ("F32", (3,), 4)}),
        "scheduler/scheduler_config.json": b"{}",
        "flux1-dev.safetensors": safetensors_file(LARGE),
    }
    found = describe(hub, tmp_path)
    assert found.weight_bytes_by_component == {"transformer": 128, "vae": 12}
    assert found.dtype_by_component == {"transformer": "BF16", "vae": "F32"}
    files = sorted(str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file())
    assert files == ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"]
    assert describe(hub, tmp_path, subfolder="vae").weight_bytes_by_component == {"model": 12}


def test_a_header_longer_than_the_first_request_is_read_whole(hub, tmp_path):
    hub.repositories["owner/name"] = {"config.json": CONFIG, "model.safetensors": safetensors_file(LARGE, header_padding=300_000)}
    assert describe(hub, tmp_path).weight_bytes_by_component == {"model": 2_000_040}


def test_a_second_description_asks_for_the_commit_alone(hub, tmp_path):
    hub.repositories["owner/name"] = {"config.json": CONFIG, "model.safetensors": safetensors_file(LARGE)}
    first = describe(hub, tmp_path)
    hub.requests.clear()
    assert describe(hub, tmp_path) == first
    assert hub.requests == ["api/models/owner/name"]


def test_offline_what_was_described_before_is_known_and_the_rest_is_an_error(hub, tmp_path, monkeypatch):
    hub.repositories["owner/name"] = {"config.json": CONFIG, "model.safetensors": safetensors_file(LARGE)}
    first = describe(hub, tmp_path)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert describe(hub, tmp_path) == first
    with pytest.raises(NotAModel, match="HF_HUB_OFFLINE"):
        describe(hub, tmp_path, "owner/other")
    assert hub.requests == []


def test_offline_a_downloaded_repository_is_described_where_it_lies(hub, tmp_path, monkeypatch):
    home = tmp_path / "models--owner--name"
    snapshot = home / "snapshots" / hub_server.COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(hub_server.COMMIT)
    (snapshot / "config.json").write_bytes(CONFIG)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotAModel, match="HF_HUB_OFFLINE"):  # configurations alone say nothing of bytes
        describe(hub, tmp_path / "ours")
    (snapshot / "model.safetensors").write_bytes(safetensors_file(LARGE))
    found = describe(hub, tmp_path / "ours")
    assert (found.folder, found.commit) == (snapshot, hub_server.COMMIT)
    assert found.weight_bytes_by_component == {"model": 2_000_040}
    assert found.dtype_by_component == {"model": "BF16"}
    assert hub.requests == []


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        ((404, "RepoNotFound"), NotAModel, "no such repository"),
        ((401, "RepoNotFound"), NotAModel, "hf auth login"),
        ((403, "GatedRepo"), NotAModel, "gated"),
        ((503, ""), OverflowmlError, "status 503"),
        ((429, ""), OverflowmlError, "fewer requests"),
    ],
)
def test_each_refusal_is_one_line_at_once(hub, tmp_path, failure, kind, words):
    hub.errors["owner/name"] = failure
    with pytest.raises(kind, match=words) as caught:
        describe(hub, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(hub.requests) == 1  # nothing is tried twice


def test_an_unknown_revision_is_named(hub, tmp_path):
    hub.repositories["owner/name"] = {"config.json": CONFIG}
    with pytest.raises(NotAModel, match=r"owner/name@nope.*revision"):
        describe(hub, tmp_path, revision="nope")


def test_nobody_listening_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    use(endpoint, monkeypatch)
    with pytest.raises(OverflowmlError, match="cannot be reached"):
        fetch_description("owner/name", None, tmp_path)


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        ({"README.md": b""}, NotAModel, "no safetensors weights"),
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, UnsafeCheckpoint, "pickle"),
        ({"a.Q4_K.gguf": b"x"}, NotAModel, "GGUF files"),
        ({"big.safetensors": b"x"}, NotAModel, "download that"),
        ({"config.json": CONFIG}, NotAModel, "no safetensors weights"),
        ({"config.json": CONFIG, "model.safetensors": b"\xff" * 20}, BadCheckpoint, "claims"),
        ({"config.json": CONFIG, "model.safetensors": safetensors_file(LARGE)[:-1]}, BadCheckpoint, "cut short"),
        ({"config.json": CONFIG, "model.safetensors": struct.pack("<Q", 50) + b"[" * 50}, BadCheckpoint, "do not begin"),
        ({"config.json": CONFIG, "model.safetensors": b""}, BadCheckpoint, "cut short"),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {"w": "../../evil.safetensors"}}'},
            BadCheckpoint,
            "evil",
        ),
        ({"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": []}'}, BadCheckpoint, "weight_map"),
        ({"model_index.json": b"[]"}, BadCheckpoint, "not an object"),
        ({"model_index.json": b'{"vae": ["a", "b"]}', "vae/config.json": b"{}", "vae/model.bin": b""}, UnsafeCheckpoint, "only as pickle"),
        ({"model_index.json": b'{"../x": ["a", "b"]}', "../x/model.safetensors": b""}, NotAModel, "download that"),
    ],
)
def test_a_repository_without_a_sound_model_is_one_line(hub, tmp_path, files, kind, words):
    hub.repositories["owner/name"] = files
    with pytest.raises(kind, match=words) as caught:
        describe(hub, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.parent.rglob("evil*"))


@pytest.mark.parametrize("repo_id", ["", "../x", "a/b/c", "a--b/c", "a/..", "a b/c", "a/b.git", "x" * 200, "a/b\0"])
def test_a_name_that_the_hub_cannot_have_is_not_asked_for(hub, tmp_path, repo_id):
    with pytest.raises(NotAModel):
        describe(hub, tmp_path, repo_id)
    assert hub.requests == []


@pytest.mark.parametrize("subfolder", ["..", "a/../b", "/a", "a//b", "a/b/c/d/e", "."])
def test_a_subfolder_cannot_lead_out_of_the_cache(hub, tmp_path, subfolder):
    with pytest.raises(NotAModel):
        describe(hub, tmp_path, subfolder=subfolder)


def test_hub_ids_are_taken_apart():
    assert split_hub_id("owner/name") == ("owner/name", None, "")
    assert split_hub_id("owner/name@v1.0") == ("owner/name", "v1.0", "")
    assert split_hub_id("owner/name/vae/inner@refs/pr/1") == ("owner/name", "refs/pr/1", "vae/inner")
    assert split_hub_id("gpt2") == ("gpt2", None, "")
