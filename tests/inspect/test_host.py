"""RAM and cores in trees of control groups that exist only in a test's folder."""

import mmap
import os
import sys
from types import SimpleNamespace

import psutil
import pytest

from overflowml_core.inspect import host
from overflowml_core.inspect.host import anonymous_bytes, disk_free_bytes, host_memory, pinnable_bytes

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture(autouse=True)
def system(monkeypatch):
    """A machine with 64 GiB, 48 of them available, and 16 cores."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_no_groups_leaves_what_the_system_says(tmp_path):
    memory = host_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes, memory.core_count) == (64 * GIB, 48 * GIB, 16)


def test_v2_limit_of_a_container_that_sees_its_group_as_root(tmp_path):
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 8 * GIB, "sys/fs/cgroup/memory.current": 3 * GIB}
    memory = host_memory(tree(tmp_path, files))
    assert (memory.total_bytes, memory.available_bytes) == (8 * GIB, 5 * GIB)


def test_v2_inactive_page_cache_is_available(tmp_path):
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 8 * GIB,
        "sys/fs/cgroup/memory.current": 7 * GIB,
        "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {6 * GIB}\ninactive_file {5 * GIB}\nactive_file {GIB}",
    }
    assert host_memory(tree(tmp_path, files)).available_bytes == 6 * GIB


def test_v2_every_level_up_to_the_root_counts(tmp_path):
    base = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/user.slice/app.scope",
        f"{base}/user.slice/app.scope/memory.max": 32 * GIB,
        f"{base}/user.slice/app.scope/memory.current": GIB,
        f"{base}/user.slice/memory.max": 16 * GIB,
        f"{base}/user.slice/memory.current": 14 * GIB,
        f"{base}/memory.max": "max",
    }
    memory = host_memory(tree(tmp_path, files))
    assert (memory.total_bytes, memory.available_bytes) == (16 * GIB, 2 * GIB)


def test_v2_limits_of_other_groups_do_not_count(tmp_path):
    files = {"proc/self/cgroup": "0::/mine", "sys/fs/cgroup/mine/memory.max": "max", "sys/fs/cgroup/other/memory.max": GIB}
    assert host_memory(tree(tmp_path, files)).total_bytes == 64 * GIB


def test_v2_throttling_limit_counts(tmp_path):
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 16 * GIB, "sys/fs/cgroup/memory.high": 12 * GIB}
    assert host_memory(tree(tmp_path, files)).total_bytes == 12 * GIB


@pytest.mark.parametrize("path", ["/docker/0123", "/../outside", "/"])
def test_v2_group_that_the_container_does_not_show(tmp_path, path):
    files = {"proc/self/cgroup": f"0::{path}", "sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/outside/memory.max": GIB}
    assert host_memory(tree(tmp_path, files)).total_bytes == 4 * GIB


def test_v1_limit_and_nested_path(tmp_path):
    base = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "11:cpu,cpuacct:/a\n4:memory:/a/b\n0::/",
        f"{base}/memory.limit_in_bytes": UNLIMITED_V1,
        f"{base}/memory.usage_in_bytes": 20 * GIB,
        f"{base}/a/memory.limit_in_bytes": 10 * GIB,
        f"{base}/a/memory.usage_in_bytes": 6 * GIB,
        f"{base}/a/memory.stat": f"inactive_file {GIB}\ntotal_inactive_file {2 * GIB}",
        f"{base}/a/b/memory.limit_in_bytes": UNLIMITED_V1,
    }
    memory = host_memory(tree(tmp_path, files))
    assert (memory.total_bytes, memory.available_bytes) == (10 * GIB, 6 * GIB)


def test_group_over_its_limit_leaves_nothing(tmp_path):
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB}
    memory = host_memory(tree(tmp_path, files))
    assert (memory.available_bytes, memory.pinnable_bytes) == (0, 0)


@pytest.mark.parametrize("text", ["", "max", "garbage", "-1"])
def test_unreadable_limit_is_no_limit(tmp_path, text):
    files = {"proc/self/cgroup": "nonsense\n0::/", "sys/fs/cgroup/memory.max": text, "sys/fs/cgroup/memory.stat": "x\ninactive_file y"}
    assert host_memory(tree(tmp_path, files)).total_bytes == 64 * GIB


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 16),
        ({"sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "9900000 100000"}, 16),
        ({"sys/fs/cgroup/cpu.max": "100000 0"}, 16),
        ({"sys/fs/cgroup/pod/cpu.max": "300000 100000", "sys/fs/cgroup/pod/box/cpu.max": "max 100000"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "250000", "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores_are_what_affinity_and_quota_leave(tmp_path, files, cores):
    root = tree(tmp_path, {"proc/self/cgroup": "3:cpu,cpuacct:/pod\n0::/pod/box", **files})
    assert host_memory(root).core_count == cores


def test_cores_without_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert host_memory(tmp_path).core_count == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert host_memory(tmp_path).core_count == 1


@pytest.mark.parametrize(
    ("total", "available", "platform", "expected"),
    [
        (64 * GIB, 64 * GIB, "linux", 64 * GIB * 90 // 100),
        (32 * GIB, 32 * GIB, "linux", 28 * GIB),
        (32 * GIB, 10 * GIB, "linux", 10 * GIB),
        (4 * GIB, 4 * GIB, "linux", GIB),
        (2 * GIB, 2 * GIB, "darwin", GIB // 2),
        (10 * GIB, 10 * GIB, "win32", 4 * GIB),
        (10 * GIB, 3 * GIB, "win32", 3 * GIB),
        (GIB, 0, "linux", 0),
    ],
)
def test_pinnable(total, available, platform, expected):
    assert pinnable_bytes(total, available, platform) == expected


def test_anonymous_bytes_of_a_fake_process(tmp_path):
    tree(
        tmp_path,
        {"proc/self/status": "Name:\tx\nVmRSS:\t  900 kB\nRssAnon:\t     100 kB\nRssFile:\t 800 kB", "proc/7/status": "RssAnon:\t 3 kB"},
    )
    assert anonymous_bytes(root=tmp_path) == 100 * 1024
    assert anonymous_bytes(7, root=tmp_path) == 3 * 1024


def test_anonymous_bytes_where_there_is_no_proc(tmp_path):
    assert anonymous_bytes(root=tmp_path) > 0


def test_anonymous_bytes_where_only_resident_ones_are_permitted(tmp_path, monkeypatch):
    def denied(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "memory_full_info", denied)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=5))
    assert anonymous_bytes(root=tmp_path) == 5


def test_anonymous_bytes_of_no_process(tmp_path):
    assert anonymous_bytes(2**22 + 1, root=tmp_path) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_anonymous_bytes_grow_by_what_is_allocated():
    before = anonymous_bytes()
    # Straight from the system: what other tests gave back to the process would be taken first.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    with mmap.mmap(-1, 64 * 2**20, **private) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert anonymous_bytes() - before > len(block) * 0.9


def test_disk_free_where_the_folder_is_not_made_yet(tmp_path):
    assert disk_free_bytes(tmp_path / "a" / "b") == pytest.approx(disk_free_bytes(tmp_path), rel=0.1)
    assert disk_free_bytes(tmp_path) > 0


def test_disk_free_that_nobody_can_tell_is_logged(tmp_path, monkeypatch, caplog):
    def fails(path):
        raise OSError("gone")

    monkeypatch.setattr(host.shutil, "disk_usage", fails)
    assert disk_free_bytes(tmp_path) == 0
    assert "gone" in caplog.text
