"""Fails every allocation, copy, pinning, read, start of a thread and event of a managed model's life, one by one, and counts.

    python benchmarks/faults.py --json benchmarks/results/faults.json

On the virtual accelerator, with a bare module whose weights are live or lie in a file. After each fault the result is right or the error
says what failed, memory and threads are as before, and the next call works; else it is told and the status is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

import torch  # noqa: E402 -- behind the path and MKL's switch
from torch import nn  # noqa: E402

from tests.runtime.build import rows, save, slots_budget, stack, virtual  # noqa: E402
from tests.runtime.conftest import Virtual  # noqa: E402
from tests.runtime.fault_points import KINDS, STAGES, Subject, Tally, sweep  # noqa: E402
from tests.vdevice import Config, install  # noqa: E402


def main() -> None:
    """Sweep, print a line for each kind and stage, and the sums."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--stride", type=int, default=1, help="fail one point in so many")
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    logging.getLogger("overflowml").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        tallies = measure(Path(folder), given.stride)
    total = {name: sum(getattr(tally, name) for tally in tallies.values()) for name in ("points", "right", "clear")}
    wrong = [problem for tally in tallies.values() for problem in tally.wrong]
    print(json.dumps({**total, "wrong": len(wrong)}))
    if given.json is not None:
        given.json.write_text(
            json.dumps({"total": {**total, "wrong": wrong}, **{k: asdict(t) for k, t in tallies.items()}}, indent=2) + "\n"
        )
    sys.exit(1 if wrong else 0)


def measure(folder: Path, stride: int) -> dict[str, Tally]:
    """Every kind in every stage, for live weights that wait in RAM and for those of a file that wait on disk."""
    gc.collect()
    gc.freeze()
    sim = install(Config(align_bytes=512, hazards="record"))
    vgpu = Virtual(sim, virtual(), sim.allocated_bytes, sim.pinned_bytes)
    module = stack(5, 16, ends=True)
    path = save(dict(module.named_parameters()), folder / "model.safetensors")
    tallies: dict[str, Tally] = {}
    for tier, source in (("pinned", None), ("disk", path)):
        subject = Subject(module, source, _call, slots_budget(module, 2, 2), tier)
        for kind in KINDS:
            for stage in STAGES:
                tally = tallies[f"{tier}, {kind}, {stage}"] = sweep(vgpu, subject, kind, stage, folder / "store", stride)
                print(
                    f"{tier:7} {kind:7} {stage:11} {tally.points:4} points {tally.right:4} right {tally.clear:4} clear",
                    *tally.wrong,
                    flush=True,
                )
    if sim.hazards:
        tallies["hazards"] = Tally(wrong=[str(one) for one in sim.hazards])
    return tallies


def _call(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(rows().to("vgpu")).cpu()


if __name__ == "__main__":
    main()
