"""Says what kind of system this is, in the words that known traps ask for. Knows nothing of devices."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from overflowml_core.inspect.cpu import read_text
from overflowml_core.inspect.driver import DriverDevice

_PLATFORMS = {"win32": "windows", "darwin": "macos"}
_CONTAINER_FILES = (".dockerenv", "run/.containerenv", "run/systemd/container", "run/secrets/kubernetes.io")
"""Left by Docker, by podman, by whatever follows systemd's container interface, and by Kubernetes."""
_CONTAINER_GROUPS = ("docker", "kubepods", "containerd", "lxc", "libpod")


def environment_words(root: Path = Path("/"), platform: str = sys.platform, devices: Iterable[DriverDevice] = ()) -> frozenset[str]:
    """Of "linux", "windows", "macos", "wsl2", "wddm", "container", those that hold here.

    "wddm" stands where Windows' display driver model holds a device's memory and may page it; Linux under WSL2 has "wsl2" alone.

    Args:
        root: where /proc and the marks of containers are looked for.
        platform: as ``sys.platform`` names it.
        devices: what the drivers report.
    """
    words = {_PLATFORMS.get(platform, "linux" if platform.startswith("linux") else platform)}
    if "linux" in words:
        kernel = (read_text(root / "proc/sys/kernel/osrelease") or read_text(root / "proc/version") or "").lower()
        if "microsoft" in kernel and ("wsl2" in kernel or (root / "dev/dxg").exists()):
            words.add("wsl2")
        groups = read_text(root / "proc/1/cgroup") or ""
        marks = any((root / name).exists() for name in _CONTAINER_FILES) or any(name in groups for name in _CONTAINER_GROUPS)
        if marks or _root_is_layered(root):
            words.add("container")
    if "windows" in words and any(device.wddm for device in devices):
        words.add("wddm")
    return frozenset(words)


def _root_is_layered(root: Path) -> bool:
    """Whether / is an overlay, as images of containers are mounted; a container with groups of its own shows no other mark."""
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        fields, _, kind = line.partition(" - ")
        if fields.split()[4:5] == ["/"]:
            return kind.startswith("overlay ")
    return False
