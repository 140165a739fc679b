"""One measured run, alone in its process: ``python -m overflowml_core.cli.demo.child``. Its parent is ``process.py``.

What it writes to standard output for its parent are lines of JSON behind a marker; libraries may write others there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overflowml_core.cli.demo.cases import BUILD, CASES, DIRECT, MANAGED, MARKER, Case, CaseInfo
from overflowml_core.cli.demo.results import Measured
from overflowml_core.cli.demo.sampler import Sampler, settle
from overflowml_core.errors import OverflowmlError


def main(arguments: list[str]) -> int:
    """Carry out one run.

    Returns:
        The exit status: 0, or 3 after an error of the project, which stands on standard error in one line.
    """
    parser = argparse.ArgumentParser(prog="overflowml_core.cli.demo.child")
    parser.add_argument("--case", required=True, choices=[info.name for info in CASES])
    parser.add_argument("--mode", required=True, choices=[BUILD, DIRECT, MANAGED])
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--budget-bytes", type=int)
    chosen = parser.parse_args(arguments)
    info = next(info for info in CASES if info.name == chosen.case)
    case: Case = importlib.import_module(info.module).CASE
    try:
        if chosen.mode == BUILD:
            case.build(chosen.folder, _report)
        else:
            measured = _measure(info, case, chosen.folder, chosen.work, chosen.budget_bytes if chosen.mode == MANAGED else None)
            (chosen.work / "result.json").write_text(measured.to_json(), encoding="utf-8")
    except OverflowmlError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 3
    return 0


def _tell(event: dict[str, Any]) -> None:
    # One write a line: a library's own line must not land in the middle.
    sys.stdout.write("\n" + MARKER + json.dumps(event) + "\n")
    sys.stdout.flush()


def _report(stage: str, done: int, total: int) -> None:
    _tell({"stage": stage, "done": done, "total": total})


def _measure(info: CaseInfo, case: Case, folder: Path, work: Path, budget_bytes: int | None) -> Measured:
    _report("importing", 0, 1)
    import torch

    if info.threads_on_two_cores is not None and (os.cpu_count() or 1) <= 2:
        torch.set_num_threads(info.threads_on_two_cores)
    device = _device(torch)
    case.warm_up(folder, device)
    _read_once(folder)
    overflowml: Any = importlib.import_module("overflowml") if budget_bytes is not None else None
    settle()
    accelerator_bytes = _accelerator_bytes(torch, device)
    baseline_bytes = accelerator_bytes() if accelerator_bytes else 0
    with Sampler(accelerator_bytes) as sampler:
        _report("loading", 0, 1)
        start = time.perf_counter()
        loaded = case.load(folder, device, budget_bytes)
        _synchronize(torch, device)
        load_s = time.perf_counter() - start
        attachment = overflowml.attachment(loaded) if overflowml else None
        if overflowml and attachment is None:
            raise OverflowmlError(f"demo: overflowml left {info.name} alone under a budget of {budget_bytes} bytes; report this")
        if attachment is not None:
            sampler.watch(lambda: int(attachment.report().device_peak_bytes))
            _tell({"plan": attachment.plan.summary()})
        start = time.perf_counter()
        answer = case.run(loaded, work, _report)
        _synchronize(torch, device)
        run_s = time.perf_counter() - start
    if accelerator_bytes is not None:
        # As on a CPU: what the libraries took for themselves in the warm-up (cuBLAS workspaces) is not the model's.
        peak_bytes: int | None = max(_highest_bytes(torch, device) - baseline_bytes, *(s.device_bytes for s in sampler.samples))
    else:
        peak_bytes = int(attachment.report().device_peak_bytes) if attachment else None
    return Measured(
        device=device,
        load_s=load_s,
        run_s=run_s,
        device_peak_bytes=peak_bytes,
        digest=answer.digest,
        output=answer.text,
        samples=sampler.samples,
        predicted_peak_bytes=attachment.plan.estimate.device_peak_bytes if attachment else None,
        plan_fingerprint=attachment.plan.fingerprint if attachment else None,
        strategy=attachment.plan.strategy if attachment else None,
    )


def _read_once(folder: Path) -> None:
    """Have the files in the system's page cache in both runs: else the first one pays for the disk and the second does not."""
    chunk = bytearray(2**22)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(chunk):
                pass


def _device(torch: Any) -> str:
    return str(torch.accelerator.current_accelerator().type) if torch.accelerator.is_available() else "cpu"


def _accelerator_bytes(torch: Any, device: str) -> Callable[[], int] | None:
    if device == "cpu":
        return None
    module = getattr(torch, device)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats()
    read = getattr(module, "memory_allocated", None) or module.current_allocated_memory  # the latter on MPS
    return lambda: int(read())


def _highest_bytes(torch: Any, device: str) -> int:
    highest = getattr(getattr(torch, device), "max_memory_allocated", None)
    return int(highest()) if highest else 0  # MPS has none; there the samples tell


def _synchronize(torch: Any, device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
