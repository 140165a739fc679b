"""Where soak.py runs: on the virtual accelerator, on a GPU or on the CPU, and what a second process takes there meanwhile."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_NEIGHBOUR = Path(__file__).with_name("soak_neighbour.py")
_GRANULE_BYTES = 2048
"""In which the virtual accelerator's driver hands memory out; a CUDA driver has 2 MiB, for models a thousand times as large."""
_MARGIN = 20
"""The largest items by their sizes are measured; another one may take so much more of the least."""
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Room:
    """Bytes of the device: what the plan may have, what the largest item takes under it, and what it takes with all blocks streamed."""

    budget_bytes: int
    most_bytes: int
    least_bytes: int


class Place(Protocol):
    """One kind of device."""

    device: torch.device

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Plans are made for it meanwhile."""
        ...

    def disturbed(self, room: Room, folder: Path, seed: int) -> contextlib.AbstractContextManager[Neighbour]:
        """A neighbour is at work meanwhile."""
        ...

    def begin_peak(self) -> None:
        """Peaks count from now on."""
        ...

    def peak_bytes(self) -> int:
        """What this process took of the device at most."""
        ...

    def taken_bytes(self) -> int | None:
        """What it takes now; None where nobody can tell what of it is the work's."""
        ...

    def between(self) -> None:
        """An item is done."""
        ...

    def problems(self) -> list[str]:
        """What the place itself saw go wrong."""
        ...


class Neighbour:
    """The second process, which is told to end by the end of its input."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, str(_NEIGHBOUR), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit(f"the neighbour did not start: {' '.join(command)}")
        self.done: dict[str, int] = {}

    def end(self) -> None:
        """Let it end, and read what it did."""
        told, _ = self._process.communicate(timeout=60)
        if self._process.returncode:
            raise SystemExit(f"the neighbour ended with {self._process.returncode}")
        self.done = json.loads(told)


@contextlib.contextmanager
def _ended(neighbour: Neighbour) -> Iterator[Neighbour]:
    try:
        yield neighbour
    finally:
        neighbour.end()


class VirtualPlace:
    """The virtual accelerator of the tests, whose memory both processes take from one ledger."""

    def __init__(self) -> None:
        from tests.runtime.build import virtual
        from tests.vdevice import Config, install

        self._sim = install(Config(align_bytes=1, hazards="record", budget_bytes=1 << 40))
        self._virtual = virtual()
        self.device = self._virtual.torch_device

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """See :class:`Place`."""
        from tests.hosts.fault_lives import on_virtual

        with on_virtual(self._virtual):
            yield

    @contextlib.contextmanager
    def disturbed(self, room: Room, folder: Path, seed: int) -> Iterator[Neighbour]:
        """See :class:`Place`."""
        from tests.vdevice.others import Ledger

        total_bytes = -(-room.budget_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        ledger = Ledger(folder / "ledger", total_bytes)
        self._sim.share(ledger, _GRANULE_BYTES)
        most_bytes = max(0, total_bytes - room.least_bytes - room.least_bytes // _MARGIN - _GRANULE_BYTES)
        arguments = ["ledger", str(folder / "ledger"), "--most", str(most_bytes), "--piece", str(_GRANULE_BYTES), "--seed", str(seed)]
        try:
            with _ended(Neighbour(arguments)) as neighbour:
                yield neighbour
        finally:
            self._sim.share(None)
            ledger.close()

    def begin_peak(self) -> None:
        """See :class:`Place`."""
        self._sim.peak_bytes = self._sim.allocated_bytes

    def peak_bytes(self) -> int:
        """See :class:`Place`."""
        return int(self._sim.peak_bytes)

    def taken_bytes(self) -> int | None:
        """See :class:`Place`."""
        return int(self._sim.allocated_bytes)

    def between(self) -> None:
        """See :class:`Place`."""
        self._sim.synchronize()
        self._sim.log.clear()  # the simulator's own diary; every operator is in it

    def problems(self) -> list[str]:
        """See :class:`Place`."""
        return list(self._sim.hazards)


class CudaPlace:
    """A GPU, of which a neighbour takes all but what is left to this process."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no CUDA device here; leave it out for the virtual accelerator")
        self.device = torch.device("cuda:0")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """See :class:`Place`."""
        yield

    @contextlib.contextmanager
    def disturbed(self, room: Room, folder: Path, seed: int) -> Iterator[Neighbour]:
        """See :class:`Place`."""
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        most_bytes = free_bytes + torch.cuda.memory_allocated(self.device) - room.least_bytes - 8 * _PIECE_BYTES
        with _ended(Neighbour(["cuda", "--most", str(max(0, most_bytes)), "--piece", str(_PIECE_BYTES), "--seed", str(seed)])) as neighbour:
            yield neighbour

    def begin_peak(self) -> None:
        """See :class:`Place`."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """See :class:`Place`."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def taken_bytes(self) -> int | None:
        """See :class:`Place`."""
        return int(torch.cuda.memory_allocated(self.device))

    def between(self) -> None:
        """See :class:`Place`."""

    def problems(self) -> list[str]:
        """See :class:`Place`."""
        return []


class CpuPlace:
    """RAM, which a neighbour fills and frees. The peak is that of anonymous memory over what there was of it before."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._before_bytes = self._peak_bytes = 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """See :class:`Place`."""
        yield

    @contextlib.contextmanager
    def disturbed(self, room: Room, folder: Path, seed: int) -> Iterator[Neighbour]:
        """See :class:`Place`."""
        most_bytes = min(2 << 30, available_bytes() // 4)
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watch.start()
        try:
            with _ended(Neighbour(["ram", "--most", str(most_bytes), "--piece", str(_PIECE_BYTES), "--seed", str(seed)])) as neighbour:
                yield neighbour
        finally:
            ended.set()
            watch.join()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.005):
            self._peak_bytes = max(self._peak_bytes, anonymous_bytes())

    def begin_peak(self) -> None:
        """See :class:`Place`."""
        self._before_bytes = self._peak_bytes = anonymous_bytes()

    def peak_bytes(self) -> int:
        """See :class:`Place`."""
        return self._peak_bytes - self._before_bytes

    def taken_bytes(self) -> int | None:
        """See :class:`Place`."""
        return None

    def between(self) -> None:
        """See :class:`Place`."""

    def problems(self) -> list[str]:
        """See :class:`Place`."""
        return []


PLACES: dict[str, Any] = {"vgpu": VirtualPlace, "cuda": CudaPlace, "cpu": CpuPlace}


def anonymous_bytes() -> int:
    """RAM of this process that no file stands behind."""
    return _field("/proc/self/status", "RssAnon:")


def available_bytes() -> int:
    """RAM that programs may still take."""
    return _field("/proc/meminfo", "MemAvailable:")


def _field(path: str, name: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
