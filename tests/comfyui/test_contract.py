"""The pack uses nothing of the host beyond what was recorded of it, in any of the versions that it is for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import contract
import pytest

_RECORDED = json.loads(contract.RECORDED.read_text())
_HOW = "; record it: python tests/comfyui/contract.py VERSION=CHECKOUT (docs/comfyui.md)"


def _names():
    return {f"{owner}.{name}" for owner, names in contract.used().items() for name in names}


def test_what_the_pack_uses_is_seen_in_its_source():
    assert {
        "comfy.model_management.EXTRA_RESERVED_VRAM",
        "comfy.model_management.free_memory",
        "comfy.patcher_extension.WrappersMP.APPLY_MODEL",
        "comfy_api.latest.io.Schema",
        "server.PromptServer.send_sync",
        "folder_paths.get_full_path",
    } <= _names()


@pytest.mark.parametrize("version", sorted(_RECORDED))
def test_every_version_has_every_name(version):
    known = _RECORDED[version]

    assert _names() - set(known) == set(), "not recorded" + _HOW
    assert [name for name in sorted(_names()) if known[name] is None] == [], f"ComfyUI {version} has no such name"


def test_versions_differ_in_optional_arguments_alone():
    newest = _RECORDED[max(_RECORDED, key=lambda version: [int(part) for part in version.split(".")])]
    for version, known in _RECORDED.items():
        for name in _names():
            before = known[name].rstrip(")").split(", ")
            assert newest[name].rstrip(")").split(", ")[: len(before)] == before, f"{name}: {known[name]} in {version}, {newest[name]} now"


@pytest.mark.comfyui
def test_this_host_is_as_it_was_recorded():
    checkout = Path(os.environ["COMFYUI_PATH"])
    version = (checkout / "comfyui_version.py").read_text().split('"')[1]
    if version not in _RECORDED:
        pytest.skip(f"ComfyUI {version} was never recorded{_HOW}")

    assert contract.signatures(checkout, contract.used()) == {name: _RECORDED[version][name] for name in _names()}
