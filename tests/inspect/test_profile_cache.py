"""Profiles are found again by content, and a broken cache is only slow."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from overflowml_core.facts import Network, Workload
from overflowml_core.inspect import profile_cache
from overflowml_core.inspect.profile_cache import ProfileCache, content_key, folder_key

NETWORK = Network((), "a folder", "Model", "0123")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "unet" / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


def test_what_was_put_is_got(tmp_path):
    cache = ProfileCache(tmp_path / "profiles")
    assert cache.get("key") is None
    cache.put("key", NETWORK)
    assert cache.get("key") == NETWORK
    assert ProfileCache(tmp_path / "profiles").get("key") == NETWORK
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["key.json"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_only_the_user_can_read_it(tmp_path):
    ProfileCache(tmp_path / "profiles").put("key", NETWORK)
    assert (tmp_path / "profiles").stat().st_mode & 0o077 == 0
    assert (tmp_path / "profiles" / "key.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 0}', '{"schema": 1, "works": 5}', "\0"])
def test_a_damaged_file_is_no_profile(tmp_path, text):
    cache = ProfileCache(tmp_path)
    cache.put("key", NETWORK)
    (tmp_path / "key.json").write_text(text)
    assert cache.get("key") is None
    cache.put("key", NETWORK)
    assert cache.get("key") == NETWORK


def test_a_file_in_the_place_of_the_folder_is_no_failure(tmp_path, caplog):
    (tmp_path / "profiles").write_text("")
    cache = ProfileCache(tmp_path / "profiles")
    cache.put("key", NETWORK)
    assert cache.get("key") is None
    assert "cannot be kept" in caplog.text


def test_the_one_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_cache, "MOST_ENTRIES", 2)
    cache = ProfileCache(tmp_path)
    for age, key in ((30, "old"), (20, "middle")):
        cache.put(key, NETWORK)
        os.utime(tmp_path / f"{key}.json", (1_000_000 - age, 1_000_000 - age))
    assert cache.get("old") == NETWORK  # and is young again
    cache.put("new", NETWORK)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["new", "old"]


def test_the_key_follows_content_workload_options_and_versions(model, monkeypatch):
    first = folder_key(model, Workload(), {})
    assert first == folder_key(model, Workload(), {})
    keys = {first, folder_key(model, Workload(batch=2), {}), folder_key(model, Workload(), {"dtype": "bfloat16"})}
    (model / "unet" / "config.json").write_text('{"a": 2}')
    keys.add(folder_key(model, Workload(), {}))
    (model / "model.safetensors").write_bytes(b"123456789")
    keys.add(folder_key(model, Workload(), {}))
    monkeypatch.setattr(profile_cache, "_version", lambda name: "99")
    keys.add(folder_key(model, Workload(), {}))
    assert len(keys) == 6
    assert None not in keys


def test_no_key_without_stable_text(model, tmp_path):
    assert folder_key(model, Workload(), {"config": object()}) is None
    assert folder_key(tmp_path / "missing", Workload(), {}) is None


def test_content_key_is_stable():
    assert content_key({"b": 1, "a": [2]}, Workload()) == content_key(json.loads('{"a": [2], "b": 1}'), Workload())
    assert content_key(1, Workload()) != content_key(1, replace(Workload(), steps=4))
