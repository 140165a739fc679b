"""What was measured comes back on the same machine, and on no other."""

import json
import logging
import os
from dataclasses import replace

import pytest

from overflowml_core.errors import OverflowmlError
from overflowml_core.inspect import calibration
from overflowml_core.inspect.calibration import (
    MOST_CALIBRATIONS,
    MOST_OPERATIONS,
    apply_calibration,
    disk_of,
    save_calibration,
    with_op_seconds,
)
from overflowml_core.inspect.machine import detect_machine
from overflowml_core.machine import Accelerator, ComputeRate, HostMemory, Machine, Rates

GIB = 2**30
ASSUMED = Rates(12e9, 12e9, 1e9)
MEASURED = Rates(24e9, 23e9, 3e9, "measured", 9e9, 8e9, 9e11, (ComputeRate("matmul", "BF16", 1.4e14),), 6e-6, (("op", 0.25),))
CPU = replace(MEASURED, h2d_bytes_per_s=5e9, op_seconds=())
CARD = Accelerator("cuda", "Card", 0, 24 * GIB, 20 * GIB, backend="cuda", capability="8.9", driver="570.1", link="PCIe 4.0 x16")
HOST = HostMemory(32 * GIB, 30 * GIB, 20 * GIB, 8, isa=frozenset({"avx2"}), cpu_name="Some CPU")


def machine(*accelerators, host=HOST):
    return Machine(accelerators, host, ASSUMED, 10**12, cpu_rates=ASSUMED if accelerators else None)


def measured(*accelerators, host=HOST):
    rated = tuple(replace(a, rates=MEASURED) for a in accelerators)
    return Machine(rated, host, MEASURED if rated else CPU, 10**12, cpu_rates=CPU if rated else None)


def test_without_a_calibration_nothing_changes(tmp_path):
    assert apply_calibration(machine(CARD), tmp_path) == machine(CARD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("accelerators", [(), (CARD,), (CARD, replace(CARD, index=1, link="PCIe 4.0 x4"))])
def test_what_was_measured_comes_back(tmp_path, accelerators):
    save_calibration(measured(*accelerators), tmp_path)
    assert apply_calibration(machine(*accelerators), tmp_path) == measured(*accelerators)


@pytest.mark.parametrize("change", [{"driver": "580.0"}, {"name": "Other"}, {"capability": "9.0"}, {"link": "PCIe 4.0 x8"}])
def test_other_hardware_or_driver_is_measured_anew(tmp_path, change):
    save_calibration(measured(CARD), tmp_path)
    other = machine(replace(CARD, **change))
    assert apply_calibration(other, tmp_path) == other


def test_other_cpu_and_other_torch_are_measured_anew(tmp_path, monkeypatch):
    save_calibration(measured(), tmp_path)
    other = machine(host=replace(HOST, core_count=4))
    assert apply_calibration(other, tmp_path) == other
    monkeypatch.setattr(calibration, "torch_version", lambda: "99.0")
    assert apply_calibration(machine(), tmp_path) == machine()


def test_free_memory_does_not_matter(tmp_path):
    save_calibration(measured(CARD), tmp_path)
    busy = machine(replace(CARD, free_bytes=GIB), host=replace(HOST, available_bytes=GIB))
    assert apply_calibration(busy, tmp_path).rates == MEASURED


def test_named_machine_is_never_taken_for_this_one(tmp_path):
    save_calibration(measured(CARD), tmp_path)
    named = replace(machine(CARD), named=True)
    assert apply_calibration(named, tmp_path) == named


def test_detection_applies_it(tmp_path):
    found = detect_machine([], tmp_path)
    assert found.rates.source == "assumed"
    save_calibration(replace(found, rates=CPU), tmp_path)
    assert detect_machine([], tmp_path).rates == CPU


def test_nothing_measured_is_nothing_to_keep(tmp_path):
    with pytest.raises(OverflowmlError, match="no rate of this machine was measured"):
        save_calibration(machine(CARD), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "rates": []}', '{"schema": 1, "rates": {"cpu": {"h2d": 1}}}',
     '{"schema": 1, "rates": {"cpu": {"h2d_bytes_per_s": -1}}}', '{"schema": 1, "rates": {"cpu": {"source": "assumed"}}}', "[" * 100_000],
)  # fmt: skip
def test_damaged_file_is_left_alone_with_a_warning(tmp_path, caplog, text):
    path = save_calibration(measured(), tmp_path)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert apply_calibration(machine(), tmp_path) == machine()
    assert str(path) in caplog.text
    assert "overflowml calibrate" in caplog.text
    save_calibration(measured(), tmp_path)
    assert apply_calibration(machine(), tmp_path) == measured()


def test_huge_file_is_not_read(tmp_path, caplog):
    path = save_calibration(measured(), tmp_path)
    with path.open("wb") as stream:
        stream.truncate(10**12)
    assert apply_calibration(machine(), tmp_path) == machine()
    assert "longer than" in caplog.text


def test_every_cut_of_the_file_is_survived(tmp_path):
    path = save_calibration(measured(CARD), tmp_path)
    text = path.read_text()
    for end in range(0, len(text), 11):
        path.write_text(text[:end])
        assert apply_calibration(machine(CARD), tmp_path) == machine(CARD)


def test_only_the_newest_files_stay(tmp_path):
    paths = []
    for index in range(MOST_CALIBRATIONS + 5):
        path = save_calibration(measured(replace(CARD, driver=str(index))), tmp_path)
        os.utime(path, (index, index))
        paths.append(path)
    kept = set((tmp_path / "calibration").iterdir())
    assert len(kept) == MOST_CALIBRATIONS
    assert paths[-1] in kept
    assert paths[0] not in kept


def test_no_temporary_file_is_left_when_writing_fails(tmp_path, monkeypatch):
    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(calibration.os, "replace", fails)
    with pytest.raises(OverflowmlError, match="disk full"):
        save_calibration(measured(), tmp_path)
    assert list((tmp_path / "calibration").iterdir()) == []


def test_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OverflowmlError, match="cannot be written"):
        save_calibration(measured(), tmp_path / "cache")


def test_seconds_of_operations_are_added_and_replaced(tmp_path):
    found = with_op_seconds(measured(CARD), {"op": 0.5, "new": 0.1})
    assert dict(found.rates.op_seconds) == {"op": 0.5, "new": 0.1}
    assert found.accelerators[0].rates == found.rates
    assert found.cpu_rates == CPU
    save_calibration(found, tmp_path)
    assert apply_calibration(machine(CARD), tmp_path) == found


def test_seconds_of_the_cpu_beside_an_accelerator():
    found = with_op_seconds(measured(CARD), {"op": 2.0}, "cpu")
    assert (dict(found.cpu_rates.op_seconds), found.rates) == ({"op": 2.0}, MEASURED)
    assert with_op_seconds(measured(CARD), {"op": 2.0}, "cuda:7") == measured(CARD)


def test_the_newest_operations_are_kept():
    first = with_op_seconds(measured(), {f"a{i}": 1.0 for i in range(MOST_OPERATIONS)})
    second = with_op_seconds(first, {"newest": 2.0})
    assert len(second.rates.op_seconds) == MOST_OPERATIONS
    assert dict(second.rates.op_seconds)["newest"] == 2.0
    assert "a0" not in dict(second.rates.op_seconds)


def test_disk_is_named_by_the_system(tmp_path):
    number = tmp_path.stat().st_dev
    table = f"30 1 {os.major(number)}:{os.minor(number)} / / rw - ext4 /dev/nvme0n1p2 rw\n"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("31 1 0:99 / /x rw - tmpfs none rw\n" + table)
    assert disk_of(tmp_path / "not" / "made", tmp_path) == "ext4 /dev/nvme0n1p2"


def test_file_holds_no_path_of_the_user(tmp_path):
    document = json.loads(save_calibration(measured(CARD), tmp_path).read_text())
    assert str(tmp_path) not in json.dumps(document)
    assert document["hardware"]["accelerators"] == [["cuda", "Card", "8.9", "570.1", "PCIe 4.0 x16"]]
