"""Keeps what was measured on a machine: one small file for each set of hardware and drivers, in the cache folder. Measures nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import digest
from overflowml_core.inspect.cpu import read_text
from overflowml_core.inspect.files import write_whole
from overflowml_core.inspect.torch_build import torch_version
from overflowml_core.machine import Accelerator, Machine, Rates

_LOG = logging.getLogger(__name__)

CALIBRATION_SCHEMA = 1
MOST_CALIBRATIONS = 16
"""Files that are kept, the newest: an environment with another torch is another file."""
MOST_OPERATIONS = 20_000
"""Timed operations that are kept for a device; the newest stay."""
_FILE_LIMIT_BYTES = 8 * 2**20
_FOLDER = "calibration"


def hardware_of(machine: Machine, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a measurement depends on: devices with their drivers and links, CPU and cores, torch, and the disk of the folder."""
    return {
        "schema": CALIBRATION_SCHEMA,
        "accelerators": [[a.kind, a.name, a.capability, a.driver, a.link] for a in machine.accelerators],
        "cpu": [machine.host.cpu_name, machine.host.core_count, sorted(machine.host.isa)],
        "torch": torch_version(),
        "disk": disk_of(folder),
    }


def disk_of(folder: str | os.PathLike[str], root: Path = Path("/")) -> str:
    """The device that holds a folder, as the system names it ("ext4 /dev/nvme0n1p2"), its device number where no name is known.

    Args:
        folder: it need not exist yet.
        root: where /proc is looked for.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        number = place.stat().st_dev
    except OSError:
        return ""
    wanted = f"{os.major(number)}:{os.minor(number)}" if hasattr(os, "major") else str(number)
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2:3] == [wanted] and rest:
            return " ".join(rest.split()[:2])
    return wanted


def apply_calibration(machine: Machine, folder: str | os.PathLike[str]) -> Machine:
    """The machine with the rates that were measured on it, the same machine where none were.

    A file that cannot be read is left alone with a warning; the next calibration replaces it.

    Args:
        machine: as detected; a named one is returned as it is.
        folder: the cache folder.
    """
    path = _path(machine, folder)
    if machine.named or path is None:
        return machine
    document = _read(path)
    if document is None:
        return machine
    try:
        return _with_measured(machine, document)
    except (OverflowmlError, KeyError, TypeError, ValueError, AttributeError) as error:
        _LOG.warning("%s: not a calibration (%s); run 'overflowml calibrate' to measure again", path, error)
        return machine


def save_calibration(machine: Machine, folder: str | os.PathLike[str]) -> Path:
    """Keep a machine's measured rates, and forget the oldest files beyond ``MOST_CALIBRATIONS``.

    Args:
        machine: with rates whose source is "measured"; others are not kept.
        folder: the cache folder; made where it is missing.

    Raises:
        OverflowmlError: nothing was measured, or the folder cannot be written.
    """
    from overflowml_core.inspect.machine_file import rates_document

    measured = {key: rates_document(_capped(rates)) for key, rates in _rates_by_device(machine).items() if rates.measured}
    if not measured:
        raise OverflowmlError("calibration: no rate of this machine was measured; run 'overflowml calibrate'")
    hardware = hardware_of(machine, folder)
    text = json.dumps({"schema": CALIBRATION_SCHEMA, "hardware": hardware, "rates": measured})
    target = Path(folder) / _FOLDER / f"{digest(hardware)}.json"
    try:
        write_whole(target, text.encode())
        _forget_oldest(target.parent)
    except OSError as error:
        raise OverflowmlError(f"calibration: {target} cannot be written ({error}); set OVERFLOWML_CACHE to a folder that can") from None
    return target


def correct_calibration(machine: Machine, correct: Callable[[Rates], Rates], folder: str | os.PathLike[str]) -> Path | None:
    """Put what running models taught into the calibration of the device that computes. What was never calibrated stays so: a few rates
    that are measured among others that are not would be taken for a calibration.

    Args:
        machine: as detected.
        correct: gives the rates as they are now known, from those that are kept.
        folder: the cache folder.

    Returns:
        The file, None where nothing was kept or nothing changed.

    Raises:
        OverflowmlError: the folder cannot be written.
    """
    if machine.named or _path(machine, folder) is None:
        return None
    kept = apply_calibration(machine, folder)
    name = kept.compute.torch_name
    before = _rates_by_device(kept).get(name)
    if before is None or not before.measured:
        return None
    after = correct(before)
    return None if after == before else save_calibration(_with_rates(kept, {name: after}), folder)


def with_op_seconds(machine: Machine, op_seconds: Mapping[str, float], torch_name: str = "") -> Machine:
    """The machine with seconds of single operations added to those of a device; a new measurement replaces an older one.

    Args:
        machine: with measured rates, or without: then nothing but the operations counts as measured.
        op_seconds: seconds of one call by signature.
        torch_name: the device, as ``Accelerator.torch_name`` has it; the one that computes where empty.
    """
    name = torch_name or machine.compute.torch_name
    rates = _rates_by_device(machine).get(name)
    if rates is None or not op_seconds:
        return machine
    # The newest come last: what is cut off is at the front.
    merged = {signature: seconds for signature, seconds in rates.op_seconds if signature not in op_seconds}
    merged.update(op_seconds)
    return _with_rates(machine, {name: _capped(replace(rates, op_seconds=tuple(merged.items())))})


def _capped(rates: Rates) -> Rates:
    return replace(rates, op_seconds=rates.op_seconds[-MOST_OPERATIONS:]) if len(rates.op_seconds) > MOST_OPERATIONS else rates


def _rates_by_device(machine: Machine) -> dict[str, Rates]:
    """Rates by the device's name in torch; the CPU's, computing or beside accelerators, under "cpu"."""
    found = {a.torch_name: machine.rates_of(i) for i, a in enumerate(machine.accelerators)}
    cpu = machine.cpu_rates if machine.accelerators else machine.rates
    if cpu is not None:
        found["cpu"] = cpu
    return found


def _with_rates(machine: Machine, by_device: Mapping[str, Rates]) -> Machine:
    def rated(accelerator: Accelerator) -> Accelerator:
        return replace(accelerator, rates=by_device.get(accelerator.torch_name, accelerator.rates))

    return replace(
        machine,
        accelerators=tuple(rated(accelerator) for accelerator in machine.accelerators),
        rates=by_device.get(machine.compute.torch_name, machine.rates),
        cpu_rates=by_device.get("cpu", machine.cpu_rates) if machine.accelerators else machine.cpu_rates,
    )


def _with_measured(machine: Machine, document: Mapping[str, Any]) -> Machine:
    from overflowml_core.inspect.machine_file import rates_of_document

    by_device = {str(name): rates_of_document(rates, f"rates[{name}]") for name, rates in document["rates"].items()}
    if not all(rates.measured for rates in by_device.values()):
        raise OverflowmlError("it holds rates that were not measured")
    return _with_rates(machine, by_device)


def _path(machine: Machine, folder: str | os.PathLike[str]) -> Path | None:
    """The machine's file where it is there. Whoever never calibrated pays one look for a folder."""
    calibrations = Path(folder) / _FOLDER
    if not calibrations.is_dir():
        return None
    path = calibrations / f"{digest(hardware_of(machine, folder))}.json"
    return path if path.is_file() else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as stream:
            raw = stream.read(_FILE_LIMIT_BYTES + 1)
        if len(raw) > _FILE_LIMIT_BYTES:
            raise ValueError(f"longer than {_FILE_LIMIT_BYTES} bytes")
        document = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        _LOG.warning("%s: the calibration cannot be read (%s); run 'overflowml calibrate' to measure again", path, error)
        return None
    if not isinstance(document, dict) or document.get("schema") != CALIBRATION_SCHEMA:
        _LOG.warning("%s: not a calibration of this version; run 'overflowml calibrate' to measure again", path)
        return None
    return document


def _forget_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[:-MOST_CALIBRATIONS]:
        with contextlib.suppress(OSError):
            path.unlink()
