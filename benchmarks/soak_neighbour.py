"""The second process of soak.py: takes and frees memory at random until its standard input ends, then prints what it did as JSON.

    python benchmarks/soak_neighbour.py ledger FILE --most BYTES
    python benchmarks/soak_neighbour.py ram --most BYTES
    python benchmarks/soak_neighbour.py cuda --most BYTES

``ledger`` takes of the virtual accelerator's device, as much as is free; ``ram`` and ``cuda`` take real pages.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import select
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
_PAUSES_S = (0.01, 0.6)
"""Shortest and longest time for which it wants the same. As long as it has less than it wants it asks again every ``_AGAIN_S``."""
_AGAIN_S = 0.002


@dataclass
class Done:
    """What a neighbour did.

    Attributes:
        wishes: how often it wanted another number of bytes.
        squeezes, releases: changes to more, and to less.
        most_bytes: that it held.
        over_bytes: the most by which both together held more than there is; below zero where they never did.
    """

    wishes: int = 0
    squeezes: int = 0
    releases: int = 0
    most_bytes: int = 0
    over_bytes: int = -(1 << 62)


class Memory(Protocol):
    """Where a neighbour takes from."""

    held_bytes: int

    def take(self, nbytes: int) -> None:
        """As many more as there are, up to these."""
        ...

    def give(self, nbytes: int) -> None:
        """About so many less."""
        ...

    def over_bytes(self) -> int:
        """By how much more is held by all than there is, as far as that can be known."""
        ...


def _ledger_class() -> Any:
    """From its file alone: the package around it imports torch."""
    spec = importlib.util.spec_from_file_location("overflowml_ledger", ROOT / "tests" / "vdevice" / "others.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Ledger


class Shared:
    """Of a ledger."""

    def __init__(self, path: Path, granule_bytes: int) -> None:
        self._ledger, self._granule_bytes, self.held_bytes = _ledger_class()(path), granule_bytes, 0

    def take(self, nbytes: int) -> None:
        """See :class:`Memory`."""
        self.held_bytes += self._ledger.take_most("theirs", nbytes, self._granule_bytes)

    def give(self, nbytes: int) -> None:
        """See :class:`Memory`."""
        given_bytes = -(-nbytes // self._granule_bytes) * self._granule_bytes
        given_bytes = min(given_bytes, self.held_bytes)
        self._ledger.give("theirs", given_bytes)
        self.held_bytes -= given_bytes

    def over_bytes(self) -> int:
        """See :class:`Memory`."""
        total, ours, theirs = self._ledger.read()
        return ours + theirs - total


class Pages:
    """Pieces of real memory."""

    def __init__(self, where: str, piece_bytes: int) -> None:
        self._where, self._piece_bytes, self._pieces = where, piece_bytes, list[Any]()

    @property
    def held_bytes(self) -> int:
        """What it holds."""
        return len(self._pieces) * self._piece_bytes

    def take(self, nbytes: int) -> None:
        """See :class:`Memory`."""
        for _ in range(nbytes // self._piece_bytes):
            if self._where == "ram":
                self._pieces.append(b"\1" * self._piece_bytes)
                continue
            import torch

            try:
                self._pieces.append(torch.empty(self._piece_bytes, dtype=torch.uint8, device=self._where))
            except torch.OutOfMemoryError:
                return

    def give(self, nbytes: int) -> None:
        """See :class:`Memory`."""
        del self._pieces[: -(-nbytes // self._piece_bytes)]
        if self._where != "ram":
            import torch

            torch.cuda.empty_cache()

    def over_bytes(self) -> int:
        """See :class:`Memory`."""
        return -(1 << 62)  # the driver tells nobody what others hold


def disturb(memory: Memory, most_bytes: int, dice: random.Random) -> Done:
    """Take and free until standard input ends; some wishes are for all, some for nothing."""
    done = Done()
    while True:
        wanted_bytes = dice.choice((0, most_bytes, dice.randint(0, most_bytes), dice.randint(0, most_bytes)))
        left_s = dice.uniform(*_PAUSES_S)
        done.wishes += 1
        before_bytes = memory.held_bytes
        if wanted_bytes < before_bytes:
            memory.give(before_bytes - wanted_bytes)
            done.releases += 1
        while left_s > 0:
            if wanted_bytes > memory.held_bytes:
                memory.take(wanted_bytes - memory.held_bytes)
            done.most_bytes = max(done.most_bytes, memory.held_bytes)
            done.over_bytes = max(done.over_bytes, memory.over_bytes())
            wait_s = _AGAIN_S if wanted_bytes > memory.held_bytes else left_s
            if select.select([sys.stdin], [], [], wait_s)[0]:
                memory.give(memory.held_bytes)
                return done
            left_s -= wait_s
        done.squeezes += memory.held_bytes > before_bytes


def main() -> None:
    """Say "ready", disturb, and print what was done."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("where", choices=("ledger", "ram", "cuda"))
    asked.add_argument("file", type=Path, nargs="?", help="of the ledger")
    asked.add_argument("--most", type=int, required=True, help="bytes to hold at most")
    asked.add_argument("--piece", type=int, default=1 << 26, help="bytes that are taken at once")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    memory = Shared(given.file, given.piece) if given.where == "ledger" else Pages(given.where, given.piece)
    if given.where == "cuda":
        memory.take(given.piece)  # the driver's own share of a process is there before anybody measures
    print("ready", flush=True)
    print(json.dumps(asdict(disturb(memory, given.most, random.Random(given.seed)))), flush=True)


if __name__ == "__main__":
    main()
