"""The soak, with a few pictures and tokens: nothing fails beside a neighbour, and what would be wrong is told."""

# ruff: noqa: E402 -- only where there is torch

from __future__ import annotations

import subprocess
import sys
from json import loads
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import soak
from report import Report
from soak_neighbour import Shared
from soak_places import Neighbour, Room, anonymous_bytes
from soak_work import TINY, Answers, Pictures

from tests.vdevice.others import Ledger

ROOT = Path(__file__).parents[2]
FIGURES = ("failures", "identical", "anonymous_growth", "over_budget", "demoted", "promoted", "retried", "neighbour_squeezes")


def test_a_few_pictures_and_tokens_beside_a_second_process(tmp_path: Path) -> None:
    json, table = tmp_path / "soak.json", tmp_path / "soak.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--images", "2", "--tokens", "30", "--scale", "tiny"]
    ended = subprocess.run([*command, "--json", str(json), "--table", str(table)], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = {figure["name"]: figure["value"] for figure in loads(json.read_text())["figures"]}
    assert found["images.generations"] == found["images.identical"] == 2
    assert found["tokens.tokens"] == 30
    assert all(f"{part}.{name}" in found for part in ("images", "tokens") for name in FIGURES)
    assert all(found[f"{part}.failures"] == 0 and found[f"{part}.over_budget"] <= 0 for part in ("images", "tokens"))
    assert found["images.neighbour_most"] > 0
    assert "| 2 generations | 2 | 0 | 2 |" in table.read_text()


def outcome(**changes: object) -> soak.Outcome:
    made = soak.Outcome(units=30, items=30, identical=30, anonymous=[100 * 2**20] * 30, room=Room(1, 1, 1))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"identical": 29}, "1 of 30 results are not those"),
        ({"failures": ["item 3: OutOfMemoryError: no"]}, "item 3"),
        ({"over_bytes": 1}, "1 bytes over the budget"),
        ({"anonymous": [2**20 * (100 + k) for k in range(30)]}, "memory grew by"),
        ({"problems": ["RAW hazard"]}, "hazard"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(changes: dict[str, object], told: str) -> None:
    assert outcome().faults == []
    assert any(told in fault for fault in outcome(**changes).faults)


def test_memory_that_grows_while_it_warms_up_is_no_growth() -> None:
    assert outcome(anonymous=[2**20 * min(100 + 50 * k, 200) for k in range(30)]).faults == []


def test_items_are_the_same_each_time_and_as_many_as_asked() -> None:
    for work, units in ((Pictures(TINY), 5), (Answers(TINY), 97)):
        items = work.items(units)
        assert items == work.items(units)
        assert sum(work.units(item) for item in items) == units


def test_two_sides_of_a_ledger_never_hold_more_than_there_is(tmp_path: Path) -> None:
    ours, theirs = Ledger(tmp_path / "ledger", 10_000), Shared(tmp_path / "ledger", 1000)
    assert ours.take("ours", 4500)
    theirs.take(9000)
    assert theirs.held_bytes == 5000
    assert not ours.take("ours", 501)
    assert ours.take("ours", 500)
    assert theirs.over_bytes() == 0
    theirs.give(1500)
    assert theirs.held_bytes == 3000
    assert ours.read() == (10_000, 5000, 3000)


def test_a_shared_device_keeps_what_was_freed_until_its_cache_is_emptied(tmp_path: Path) -> None:
    from tests.vdevice import install

    sim, ledger = install(), Ledger(tmp_path / "ledger", 1 << 20)
    base = sim.allocated_bytes
    sim.share(ledger, 4096)
    try:
        x = torch.empty(100_000, dtype=torch.uint8, device="vgpu")
        held = torch.vgpu.memory_reserved()
        assert held >= base + 100_000
        assert held % 4096 == 0
        del x
        assert torch.vgpu.memory_reserved() == held
        assert ledger.take_most("theirs", 1 << 20, 4096) == (1 << 20) - held
        y = torch.empty(100_000, dtype=torch.uint8, device="vgpu")  # out of what was kept
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(8192, dtype=torch.uint8, device="vgpu")
        assert torch.vgpu.mem_get_info() == (0, 1 << 20)
        del y
        torch.vgpu.empty_cache()
        assert torch.vgpu.memory_reserved() == -(-base // 4096) * 4096
    finally:
        install()


def test_anonymous_memory_is_that_of_this_process() -> None:
    before = anonymous_bytes()
    pages = bytearray(b"\1" * (32 << 20))
    assert anonymous_bytes() - before >= len(pages) * 9 // 10


def test_a_neighbour_that_cannot_start_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="neighbour did not start"):
        Neighbour(["ledger", str(tmp_path / "gone"), "--most", "1"])


def test_figures_have_units() -> None:
    report = Report("soak")
    soak.add_figures(report, Pictures(TINY), outcome())
    assert {figure["unit"] for figure in report.figures} >= {"bytes", "%", "s", "events", "failures"}
