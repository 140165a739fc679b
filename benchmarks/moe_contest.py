"""The sides of the benchmark of mixtures of experts: each in a process and a control group of its own, answering the same prompts in turn.

Every turn is another prompt and another text, so that no side's cache knows them; before the first one each side has answered a short one.
Between turns the direct read rate of the same files is measured.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_model import text_of
from moe_trace import Trace
from stream_load import Sampler
from stream_model import weight_files
from stream_rate import read_rate
from stream_system import Cage, available_bytes, drop_cache, make_cage
from stream_worker import SideFailed, Worker

SIDES = ("ours", "accelerate", "resident")
IMPORTS: dict[str, Sequence[str]] = {
    "ours": ("transformers", "accelerate", "overflowml"),
    "accelerate": ("transformers", "accelerate"),
    "resident": ("transformers", "accelerate"),
}
SCRIPT = "moe_side.py"
IN_FLIGHT = 4
_WARM_TOKENS = {"ours": 16, "resident": 4, "accelerate": 0}
"""Of the answer before the first turn. accelerate keeps nothing from token to token that would have to be warm."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and where.

    Attributes:
        model: a folder with safetensors.
        work: for logs, logits, traces and offloaded weights.
        budget_bytes: what a side is told it may use for weights.
        allowance_bytes: what a process may take beyond it, for the interpreter and its libraries.
        prompt_tokens, new_tokens: of an answer.
        slow_tokens: of an answer of accelerate's, which needs seconds for each.
        turns: answers of each side.
        vocabulary: of the model.
        sides: names of the sides.
        threads: that torch computes with; 0 leaves it to torch.
    """

    model: Path
    work: Path
    budget_bytes: int
    allowance_bytes: int
    prompt_tokens: int
    new_tokens: int
    slow_tokens: int
    turns: int
    vocabulary: int
    sides: tuple[str, ...] = SIDES
    threads: int = 0

    @property
    def limit_bytes(self) -> int:
        """Memory limit of a side, pages of files included."""
        return self.budget_bytes + self.allowance_bytes

    @property
    def workload(self) -> dict[str, int]:
        """As the sides' commands have it."""
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}

    def answer_of(self, turn: int, prompt_tokens: int, new_tokens: int) -> dict[str, list[int]]:
        """Prompt and text of a turn; another turn has another text."""
        ids = text_of(self.prompt_tokens + self.new_tokens, self.vocabulary, seed=100 + turn)
        return {"prompt": ids[:prompt_tokens], "text": ids[self.prompt_tokens : self.prompt_tokens + new_tokens]}


@dataclass
class Answers:
    """What the answers of one side showed.

    Attributes:
        load_s: of its load.
        prefill_s, prefill_read_bytes: of each answer.
        seconds, read_bytes: of each token of all answers.
        said: of each answer, the tokens that it took for the next ones.
        told: for each answer, what the side said before and after its tokens.
        anonymous_peak_bytes: most memory that no file stands behind, while it loaded and answered.
        cage_peak_bytes: most memory of its group, pages of files included, where it had one.
        error: why there is no more; empty where nothing failed.
    """

    load_s: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    prefill_read_bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)
    told: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    anonymous_peak_bytes: int = 0
    cage_peak_bytes: int | None = None
    error: str = ""

    @property
    def token_s(self) -> float:
        """Mean of all tokens: which experts a token misses is chance, and an answer is their sum."""
        return statistics.fmean(self.seconds)

    @property
    def prompt_s(self) -> float:
        """Median of the prefills."""
        return statistics.median(self.prefill_s)

    def add(self, answer: dict[str, Any]) -> None:
        """Note an answer."""
        self.prefill_s.append(answer["prefill_s"])
        self.prefill_read_bytes.append(answer["prefill_read_bytes"])
        self.seconds += answer["seconds"]
        self.read_bytes += answer["read_bytes"]
        self.said.append(answer["said"])
        self.told.append((answer["told_before"], answer["told"]))


class Contest:
    """The sides at work; leaving it ends their processes and takes their groups away."""

    def __init__(self, settings: Settings, notes: list[str]) -> None:
        self._settings = settings
        self._notes = notes
        self._files = weight_files(settings.model)
        self._workers: dict[str, Worker] = {}
        self._cages: dict[str, Cage] = {}
        self.results: dict[str, Answers] = {}
        self.rates: list[float] = []

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for name, worker in self._workers.items():
            if not self.results[name].error:
                self._try(name, lambda side, _: self._workers[side].ask("quit"))
            worker.close()
        for name, cage in self._cages.items():
            try:
                cage.remove()
            except OSError as error:
                self._notes.append(f"the control group of {name} could not be taken away: {error}")

    def run(self) -> None:
        """Load all sides, then let them take turns."""
        settings = self._settings
        self._isolate()
        for name in settings.sides:
            self._try(name, self._start)
        for turn in range(settings.turns):
            # The last shard is read only: the whole model would take as long as all answers together.
            self.rates.append(read_rate(self._files[-1:], IN_FLIGHT))
            for name in settings.sides if turn % 2 == 0 else settings.sides[::-1]:
                self._try(name, lambda side, result, turn=turn: self._turn(side, result, turn))

    def logits(self, name: str, turn: int) -> Path:
        """Where a side's logits of a turn lie: float32, a row for the prefill and one for each token."""
        return self._settings.work / f"{name}-{turn}.logits"

    def trace(self, name: str) -> Path:
        """Where what the routers of a side chose lies, without the number of the turn."""
        return self._settings.work / f"{name}.trace"

    def traces(self, name: str) -> list[Trace]:
        """What the routers of a side chose, for each turn."""
        files = (self.trace(f"{name}-{turn}") for turn in range(self._settings.turns))
        return [Trace.read(file) for file in files if file.exists()]

    def _isolate(self) -> None:
        """Give each side but the resident one a group with the memory limit."""
        settings = self._settings
        caged = [name for name in settings.sides if name != "resident"]
        for name in caged:
            cage = make_cage(f"overflowml-moe-{name}-{os.getpid()}", settings.limit_bytes)
            if cage is not None:
                self._cages[name] = cage
        if all(name in self._cages for name in caged):
            self._notes.append(f"memory limit of {settings.limit_bytes} bytes for each side but resident, by control groups")
        else:
            self._notes.append(
                "no control group can be made here: no side has a memory limit, and the page cache is dropped before each turn"
            )

    def _try(self, name: str, step: Callable[[str, Answers], None]) -> None:
        """Let a side do something; one that failed before is left out, one that fails now is out from now on."""
        result = self.results.setdefault(name, Answers())
        if result.error:
            return
        try:
            step(name, result)
        except (SideFailed, OSError) as error:
            result.error = str(error)
            self._notes.append(f"{name}: {error}")
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            if name in self._workers:
                self._workers[name].close()

    def _start(self, name: str, result: Answers) -> None:
        settings = self._settings
        if name == "resident":
            needed_bytes = sum(file.stat().st_size for file in self._files) * 5 // 4
            if (available_bytes() or needed_bytes) < needed_bytes:
                raise SideFailed(f"left out: {needed_bytes} bytes of RAM are not available")
        worker = Worker(name, settings.work / f"{name}.log", cage=self._cages.get(name), script=SCRIPT)
        self._workers[name] = worker
        worker.ready(IMPORTS[name], settings.threads)
        with _Watched(worker, result):
            loaded = worker.load(name, settings.model, settings.work / f"scratch-{name}", settings.budget_bytes)
            result.load_s = loaded["seconds"]
            drop_cache(self._files)
            worker.ask("answer", **settings.answer_of(-1, 16, _WARM_TOKENS[name]), trace=str(self.trace(f"{name}-warm")))
        print(f"# {name:10} loaded in {result.load_s:.1f} s", file=sys.stderr, flush=True)

    def _turn(self, name: str, result: Answers, turn: int) -> None:
        settings = self._settings
        new_tokens = settings.slow_tokens if name == "accelerate" else settings.new_tokens
        drop_cache(self._files)
        with _Watched(self._workers[name], result):
            answer = self._workers[name].ask(
                "answer",
                **settings.answer_of(turn, settings.prompt_tokens, new_tokens),
                logits=str(self.logits(name, turn)),
                trace=str(self.trace(f"{name}-{turn}")),
            )
        result.add(answer)
        if name in self._cages:
            result.cage_peak_bytes = self._cages[name].peak_bytes()
        rate = len(answer["seconds"]) / sum(answer["seconds"])
        print(f"# {name:10} prefill {answer['prefill_s']:.2f} s, {rate:.2f} tokens/s", file=sys.stderr, flush=True)


class _Watched:
    """A process whose memory is looked at while it works."""

    def __init__(self, worker: Worker, result: Answers) -> None:
        self._sampler = Sampler(worker.pid)
        self._result = result

    def __enter__(self) -> None:
        self._sampler.start()

    def __exit__(self, *_: object) -> None:
        self._sampler.end()
        self._result.anonymous_peak_bytes = max(self._result.anonymous_peak_bytes, self._sampler.peak_bytes)


def differences(contest: Contest, settings: Settings) -> dict[str, tuple[float, float]]:
    """By side, the largest difference of a logit from the resident side's, and the share of tokens that both took for the next one."""
    import torch

    def read(name: str, turn: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(contest.logits(name, turn).read_bytes()), dtype=torch.float32).view(-1, settings.vocabulary)

    found = {}
    right = contest.results.get("resident")
    for name, result in contest.results.items():
        turns = min(len(result.said), len(right.said)) if right is not None else 0
        if name == "resident" or not turns:
            continue
        most, same, all_tokens = 0.0, 0, 0
        for turn in range(turns):
            theirs = read(name, turn)
            most = max(most, float((theirs - read("resident", turn)[: len(theirs)]).abs().max()))
            pairs = list(zip(result.said[turn], right.said[turn], strict=False))
            same += sum(one == other for one, other in pairs)
            all_tokens += len(pairs)
        found[name] = (most, same / all_tokens)
    return found


def table(results: dict[str, Answers]) -> str:
    """The sides as Markdown."""
    lines = [
        "| side | load | prefill | token | tokens/s | read a prefill | read a token | anonymous memory at most | with pages of files | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if not result.seconds:
            lines.append(f"| {name} |{' |' * 8} {_cell(result.error or 'no answer')} |")
            continue
        cells = [
            name,
            f"{result.load_s:.1f} s",
            f"{result.prompt_s:.2f} s",
            f"{result.token_s:.3f} s",
            f"{1 / result.token_s:.2f}",
            f"{statistics.median(result.prefill_read_bytes) / 1e9:.2f} GB",
            f"{statistics.fmean(result.read_bytes) / 1e6:.0f} MB",
            f"{result.anonymous_peak_bytes / 1e9:.2f} GB",
            f"{result.cage_peak_bytes / 1e9:.2f} GB" if result.cage_peak_bytes else "no limit",
            _cell(result.error),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def counted(told: Iterable[tuple[dict[str, Any], dict[str, Any]]], name: str) -> float:
    """How far one of the engine's counts of experts rose from what a side said before to what it said after; 0 where it counts none."""
    pairs = [(before.get("experts"), after.get("experts")) for before, after in told]
    return sum(after[name] - before[name] for before, after in pairs if before and after)


def hit_rate(told: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float | None:
    """Share of the experts that tokens asked for that the cache had kept; None where none are counted.

    Those that were brought in because they were expected are not among the hits: what a cache misses comes sooner that way, and comes.
    """
    requests = counted(told, "requests")
    return counted(told, "hits") / requests if requests else None
