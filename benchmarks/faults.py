"""Fails every allocation, copy, pinning, read, start of a thread and event of a managed model's life, one by one, and counts.
The kind "interrupt" raises KeyboardInterrupt wherever a signal could be answered in the calling thread.

    python benchmarks/faults.py --json benchmarks/results/faults.json
    python benchmarks/faults.py --hosts --stride 7

On the virtual accelerator: a bare module, and with ``--hosts`` a transformers model that decodes and a diffusers pipeline, each with an
adapter. Weights wait in RAM, then on disk. After each fault the result is right or the error says what failed, memory and threads are as
before, and the next call works; else it is told and the status is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

import torch  # noqa: E402 -- behind the path and MKL's switch

from tests.runtime.build import virtual  # noqa: E402
from tests.runtime.conftest import Virtual  # noqa: E402
from tests.runtime.fault_lives import BareSubject  # noqa: E402
from tests.runtime.fault_points import INTERRUPT, KINDS, Subject, Tally, sweep  # noqa: E402
from tests.vdevice import Config, install  # noqa: E402

_HOST_ROOM_BYTES = 40_000
_TIERS = ("pinned", "disk")


def main() -> None:
    """Sweep, print a line for each kind and stage, and the sums."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--stride", type=int, default=1, help="fail one point in so many")
    asked.add_argument("--hosts", action="store_true", help="models of transformers and diffusers instead of a bare module; takes hours")
    asked.add_argument("--kinds", nargs="+", choices=(*KINDS, INTERRUPT), default=(*KINDS, INTERRUPT))
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    logging.getLogger("overflowml").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sim = install(Config(align_bytes=512, hazards="record"))
    vgpu = Virtual(sim, virtual(), sim.allocated_bytes, sim.pinned_bytes)
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, subject in (_hosts if given.hosts else _bare)(vgpu, Path(folder)):
            gc.collect()
            gc.freeze()
            for kind in given.kinds:
                for stage in subject.stages:
                    tally = tallies[f"{name}, {kind}, {stage}"] = sweep(vgpu, subject, kind, stage, given.stride)
                    counts = f"{tally.points:5} points {tally.right:5} right {tally.clear:5} clear"
                    print(f"{name:20} {kind:9} {stage:11} {counts}", *tally.wrong, flush=True)
    if sim.hazards:
        tallies["hazards"] = Tally(wrong=[str(one) for one in sim.hazards])
    sys.exit(_tell(tallies, given.stride, given.json))


def _tell(tallies: dict[str, Tally], stride: int, path: Path | None) -> int:
    total = {name: sum(getattr(tally, name) for tally in tallies.values()) for name in ("points", "right", "clear")}
    wrong = [problem for tally in tallies.values() for problem in tally.wrong]
    print(json.dumps({"stride": stride, **total, "wrong": len(wrong)}))
    if path is not None:
        found = {"stride": stride, "total": {**total, "wrong": wrong}, **{name: asdict(tally) for name, tally in tallies.items()}}
        path.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if wrong else 0


def _bare(vgpu: Virtual, folder: Path) -> Iterator[tuple[str, Subject]]:
    for tier in _TIERS:
        own = folder / tier
        own.mkdir()
        yield f"bare, {tier}", BareSubject(vgpu.device, own, tier, blocks=5, resident=2)


def _hosts(vgpu: Virtual, folder: Path) -> Iterator[tuple[str, Subject]]:
    os.environ["OVERFLOWML_CACHE"] = str(folder / "cache")
    warnings.simplefilter("ignore")
    import diffusers
    import transformers

    import overflowml
    from overflowml_core import description, session
    from tests.hosts.fault_lives import HostSubject, flux_subject, llama_subject, on_virtual

    for host in (transformers, diffusers):
        host.utils.logging.set_verbosity_error()
        host.utils.logging.disable_progress_bar()
    for name in ("transformers", "diffusers"):
        if name not in session.plugins().names():
            session.plugins().register(importlib.import_module(f"overflowml_{name}"), name)
    description._measured = lambda *_: None  # profiles cost seconds, and say nothing of a simulated device
    overflowml.install()
    makers: dict[str, Callable[[Path], HostSubject]] = {"transformers": llama_subject, "diffusers": flux_subject}
    with on_virtual(vgpu.device):
        for name, make in makers.items():
            for tier in _TIERS:
                own = folder / f"{name}-{tier}"
                own.mkdir()
                yield f"{name}, {tier}", make(own).within(_HOST_ROOM_BYTES, 0 if tier == "disk" else None)


if __name__ == "__main__":
    main()
