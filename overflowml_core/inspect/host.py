"""Reads what RAM, cores and disk this process may use. Knows nothing of models and accelerators.

A container sees the machine's RAM in /proc/meminfo and is killed at its own limit, so the limits of its control groups count.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from overflowml_core.facts import HostMemory
from overflowml_core.inspect.cpu import cpu_isa, cpu_name

_LOG = logging.getLogger(__name__)
_GIB = 2**30

WINDOWS_PINNABLE_PERCENT = 40
PINNABLE_PERCENT = 90
PINNABLE_LEAVES_BYTES = 4 * _GIB
PINNABLE_FLOOR_PERCENT = 25
"""How much RAM may be page-locked: 40 % on Windows, elsewhere the smaller of 90 % and all but 4 GiB. These are the caps that
ComfyUI (https://github.com/comfyanonymous/ComfyUI, comfy/model_management.py) arrived at with its users. On small machines
"all but 4 GiB" would leave nothing, hence a floor of a quarter; what is available is the ceiling in any case."""


@dataclass(frozen=True, slots=True)
class _Controller:
    """File names of one generation of memory control groups; ``limits`` are alternatives that all apply."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


# memory.high is not fatal, but above it the kernel throttles the process to a crawl (kernel: admin-guide/cgroup-v2.rst)
_V2 = _Controller(("memory.max", "memory.high"), "memory.current", ("inactive_file",))
_V1 = _Controller(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "inactive_file"))


def host_memory(root: Path = Path("/")) -> HostMemory:
    """RAM and cores as this process may use them.

    Args:
        root: where /proc and /sys are looked for; tests give a tree of their own.
    """
    system = psutil.virtual_memory()
    total, available = system.total, system.available
    for limit_bytes, left_bytes in _memory_limits(root):
        total = min(total, limit_bytes)
        available = min(available, left_bytes)
    available = max(0, min(available, total))
    return HostMemory(
        total_bytes=total,
        available_bytes=available,
        pinnable_bytes=pinnable_bytes(total, available),
        core_count=_core_count(root),
        swap_bytes=_swap_bytes(root),
        isa=cpu_isa(root),
        cpu_name=cpu_name(root),
    )


def pinnable_bytes(total_bytes: int, available_bytes: int, platform: str = sys.platform) -> int:
    """How much RAM may be page-locked without starving the system, in bytes.

    Args:
        total_bytes: RAM of the machine or limit of the container.
        available_bytes: what can be taken of it without swapping.
        platform: as ``sys.platform`` names it.
    """
    if platform == "win32":
        cap = total_bytes * WINDOWS_PINNABLE_PERCENT // 100
    else:
        cap = min(total_bytes * PINNABLE_PERCENT // 100, total_bytes - PINNABLE_LEAVES_BYTES)
    return max(0, min(available_bytes, max(cap, total_bytes * PINNABLE_FLOOR_PERCENT // 100)))


def anonymous_bytes(pid: int | None = None, root: Path = Path("/")) -> int | None:
    """Memory of a process that no file backs, in bytes; None where nobody can tell.

    On Linux this is RssAnon: mapped checkpoints, which the kernel can drop, do not count. Elsewhere it is the unique set size,
    or the resident set size where that is not permitted.

    Args:
        pid: the process; None for this one.
        root: where /proc is looked for.
    """
    status = _read(root / "proc" / ("self" if pid is None else str(pid)) / "status") or ""
    for line in status.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "RssAnon:" and words[1].isdigit():
            return int(words[1]) * 1024  # always kB (man 5 proc_pid_status)
    try:
        process = psutil.Process(pid)
        try:
            return int(process.memory_full_info().uss)
        except (psutil.AccessDenied, AttributeError):
            return int(process.memory_info().rss)
    except (psutil.Error, OSError):
        return None


def disk_free_bytes(path: str | os.PathLike[str]) -> int:
    """What this user may still write where the path is, or would be once created, in bytes; 0 where nobody can tell."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        _LOG.warning("%s: free disk space is unknown (%s); nothing will be written there", folder, error)
        return 0


def _swap_bytes(root: Path) -> int:
    """Free swap space, from /proc/meminfo where that is there; a container may be allowed less."""
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "SwapFree:" and words[1].isdigit():
            return int(words[1]) * 1024  # always kB (man 5 proc_meminfo)
    if sys.platform.startswith("linux"):
        return 0
    try:
        return int(psutil.swap_memory().free)
    except (psutil.Error, OSError):
        return 0


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) in bytes for each control group that this process is in, up to the root."""
    groups = _groups(root)
    mount = root / "sys/fs/cgroup"
    for controller, base, path in ((_V2, mount, groups.get("")), (_V1, mount / "memory", groups.get("memory"))):
        for folder in _upwards(base, path or "/"):
            limits = [limit for name in controller.limits if (limit := _number(folder / name)) is not None]
            if limits:
                limit = min(limits)
                yield limit, limit - _usage(folder, controller)


def _usage(folder: Path, controller: _Controller) -> int:
    """Bytes charged to a group that cannot be had back at once; the page cache of files read long ago can."""
    usage = _number(folder / controller.usage) or 0
    stat = dict(line.split(maxsplit=1) for line in (_read(folder / "memory.stat") or "").splitlines() if " " in line)
    for name in controller.reclaimable:
        if stat.get(name, "").strip().isdigit():
            return max(0, usage - int(stat[name]))
    return usage


def _core_count(root: Path) -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([cores, *_cpu_quotas(root)]))


def _cpu_quotas(root: Path) -> Iterator[int]:
    """Cores that the process may use at once by each group's CPU time quota, rounded up."""
    groups = _groups(root)
    mount = root / "sys/fs/cgroup"
    for folder in _upwards(mount, groups.get("") or "/"):
        quota, _, period = (_read(folder / "cpu.max") or "").strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield -(-int(quota) // int(period))
    for base in (mount / "cpu", mount / "cpu,cpuacct"):
        for folder in _upwards(base, groups.get("cpu") or "/"):
            quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            if quota_us and period_us:
                yield -(-quota_us // period_us)


def _groups(root: Path) -> dict[str, str]:
    """Path of this process's group by controller; the key of version 2 is "" (man 7 cgroups)."""
    found: dict[str, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            found.update(dict.fromkeys(fields[1].split(","), fields[2]))
    return found


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """The group's folder and its parents up to the mount. Folders that a container does not show are simply not there."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:  # a group outside the visible tree
        parts = []
    for depth in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:depth])


def _number(path: Path) -> int | None:
    """A file that holds one number from 0; None for "max", -1 (both: no limit) and a file that is not there."""
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
