"""A run in its own process: its reports arrive, its failure is told, its environment is the run's own."""

from __future__ import annotations

import os
import sys
import time

import pytest

from overflowml_core.cli.demo.cases import BUILD, DIRECT, MANAGED, MARKER
from overflowml_core.cli.demo.faults import ChildFailed
from overflowml_core.cli.demo.process import Job, run_job, stream
from overflowml_core.cli.demo.sampler import Sampler, process_memory

MIB = 2**20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_reports_arrive_among_other_lines(tmp_path):
    code = f"print('noise'); print({MARKER!r} + '{{\"stage\": \"x\"}}'); print({MARKER!r} + 'broken'); print({MARKER!r} + '[1]')"
    seen = []
    status, tail = stream(python(code), dict(os.environ), tmp_path, seen.append)
    assert (status, tail, seen) == (0, "", [{"stage": "x"}])


def test_tail_of_standard_error_is_kept_and_no_more(tmp_path):
    code = "import sys\nfor i in range(100000): sys.stderr.write(f'line {i}\\n')\nsys.exit(7)"
    status, tail = stream(python(code), dict(os.environ), tmp_path, lambda _: None)
    assert status == 7
    assert tail.splitlines()[-1] == "line 99999"
    assert len(tail.splitlines()) == 20


def test_run_that_hangs_is_ended(tmp_path):
    start = time.monotonic()
    status, _ = stream(python("import time; time.sleep(600)"), dict(os.environ), tmp_path, lambda _: None, patience_s=0.5)
    assert status is None
    assert time.monotonic() - start < 30


def test_child_that_cannot_load_is_reported_with_its_last_lines(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ChildFailed) as caught:
        run_job(Job("smollm2", DIRECT, tmp_path / "nowhere", tmp_path), lambda _: None)
    assert caught.value.status not in (0, None)
    assert "nowhere" in caught.value.stderr_tail
    assert "smollm2, direct" in str(caught.value)


def test_child_that_ends_without_a_result_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "arguments", lambda self: python("pass"))
    with pytest.raises(ChildFailed, match="no readable result"):
        run_job(Job("smollm2", DIRECT, tmp_path, tmp_path), lambda _: None)


def test_build_needs_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "arguments", lambda self: python("pass"))
    assert run_job(Job("smollm2", BUILD, tmp_path, tmp_path), lambda _: None) is None


def test_budget_reaches_only_the_managed_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFLOWML_DEVICE_MEMORY", "1GB")
    direct = Job("smollm2", DIRECT, tmp_path, tmp_path)
    managed = Job("smollm2", MANAGED, tmp_path, tmp_path, budget_bytes=89_686_851, reserve_bytes=16_000_000)
    assert "OVERFLOWML_DEVICE_MEMORY" not in direct.environment()
    assert managed.environment()["OVERFLOWML_DEVICE_MEMORY"] == "89686851B"
    assert managed.environment()["OVERFLOWML_RESERVE"] == "16000000B"
    assert "--budget-bytes" in managed.arguments()
    assert "--budget-bytes" not in direct.arguments()


def test_sampler_sees_64_mib_come(tmp_path):
    with Sampler() as sampler:
        block = bytearray(64 * MIB)
        block[::1024] = b"x" * len(block[::1024])
        time.sleep(0.1)
    growth = max(s.anonymous_bytes for s in sampler.samples)
    assert 63 * MIB < growth < 90 * MIB
    assert [s.second for s in sampler.samples] == sorted(s.second for s in sampler.samples)
    del block


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms do not tell mapped pages apart")
def test_mapped_file_is_not_anonymous(tmp_path):
    import mmap

    path = tmp_path / "weights.bin"
    path.write_bytes(b"w" * (32 * MIB))
    before = process_memory()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) > 0
        after = process_memory()
    assert after.mapped_bytes - before.mapped_bytes > 30 * MIB
    assert after.anonymous_bytes - before.anonymous_bytes < 16 * MIB


def test_sampler_reads_device_and_engine():
    with Sampler(device_bytes=lambda: 5 * MIB) as sampler:
        sampler.watch(lambda: 3 * MIB)
        time.sleep(0.05)
    assert sampler.samples[-1].device_bytes == 0  # growth above what was there
    assert sampler.samples[-1].engine_bytes == 3 * MIB
