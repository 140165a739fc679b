"""Each trap of the environment: surroundings that are in it, and surroundings that are not."""

from __future__ import annotations

import pytest

from overflowml_core.traps import CATALOG, Surroundings, findings


def _around(*words: str, kinds: tuple[str, ...] = ("cuda", "nvidia"), **variables: str) -> Surroundings:
    return Surroundings(frozenset(words), frozenset(kinds), variables)


def _cache(file_system: str, *words: str) -> Surroundings:
    return Surroundings(frozenset(words), cache_folder="/cache", cache_file_system=file_system)


CASES: dict[str, tuple[list[Surroundings], list[Surroundings]]] = {
    "expandable-segments-on-wddm": (
        [
            _around("windows", "wddm", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"),
            _around("windows", "wddm", PYTORCH_ALLOC_CONF="max_split_size_mb:64, Expandable_Segments:true"),
        ],
        [
            _around("linux", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"),
            _around("windows", "wddm", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:False"),
            _around("windows", "wddm"),
        ],
    ),
    "launches-block": (
        [_around("linux", CUDA_LAUNCH_BLOCKING="1"), _around("linux", HIP_LAUNCH_BLOCKING="true")],
        [_around("linux", CUDA_LAUNCH_BLOCKING="0"), _around("linux", CUDA_LAUNCH_BLOCKING="")],
    ),
    "no-allocator-cache": ([_around("linux", PYTORCH_NO_CUDA_MEMORY_CACHING="0")], [_around("linux")]),
    "mps-without-limit": (
        [
            _around("macos", PYTORCH_MPS_HIGH_WATERMARK_RATIO="0.0"),
            _around("macos", PYTORCH_MPS_HIGH_WATERMARK_RATIO="0"),
            _around("macos", PYTORCH_MPS_HIGH_WATERMARK_RATIO="none"),
        ],
        [_around("macos", PYTORCH_MPS_HIGH_WATERMARK_RATIO="0.8"), _around("linux", PYTORCH_MPS_HIGH_WATERMARK_RATIO="0.0")],
    ),
    "devices-hidden": (
        [_around("linux", CUDA_VISIBLE_DEVICES=""), _around("linux", CUDA_VISIBLE_DEVICES="-1")],
        [_around("linux", CUDA_VISIBLE_DEVICES="0"), _around("linux", kinds=(), CUDA_VISIBLE_DEVICES=""), _around("linux")],
    ),
    "cache-in-memory": ([_cache("tmpfs")], [_cache("ext4"), _cache("")]),
    "cache-on-remote-drive": ([_cache("9p", "linux", "wsl2"), _cache("nfs4", "linux")], [_cache("ext4", "linux", "wsl2"), _cache("")]),
    "wsl2-pinning": ([_around("linux", "wsl2")], [_around("linux"), _around("linux", "wsl2", kinds=())]),
}


def test_every_trap_of_the_environment_has_its_cases():
    assert {trap.name for trap in CATALOG if trap.kind == "environment"} == set(CASES)
    assert {trap.name for trap in CATALOG if trap.look is not None} == set(CASES)


@pytest.mark.parametrize("name", sorted(CASES))
def test_is_found_where_it_is_and_only_there(name):
    there, absent = CASES[name]
    for surroundings in there:
        found = {finding.trap: finding for finding in findings(surroundings)}
        assert found[name].detail
        assert found[name].fix
    for surroundings in absent:
        assert name not in {finding.trap for finding in findings(surroundings)}


def test_a_variable_is_taken_out_as_its_shell_does_it():
    (linux,) = findings(_around("linux", CUDA_LAUNCH_BLOCKING="1"))
    (windows,) = findings(_around("windows", CUDA_LAUNCH_BLOCKING="1"))
    assert (linux.fix, windows.fix) == ("unset CUDA_LAUNCH_BLOCKING", "set CUDA_LAUNCH_BLOCKING=")


def test_a_windows_drive_and_a_network_are_told_apart():
    (windows,) = findings(_cache("9p", "linux", "wsl2"))
    (network,) = findings(_cache("nfs", "linux", "wsl2"))
    assert "a Windows drive" in windows.detail
    assert "a network" in network.detail


def test_plain_surroundings_are_in_no_trap():
    assert findings(Surroundings(frozenset({"linux"}), frozenset({"cuda", "nvidia"}), {"PATH": "/bin"}, "/cache", "ext4")) == []
