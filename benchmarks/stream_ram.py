"""The ram part: steps of models that wait in RAM, on an accelerator, under budgets, beside the peers and the limit.

Sides take turns in one process, each on a shell of its own over the same weights. The limit is t* = max(resident step, streamed bytes /
pinned copy rate), both measured in the same run. Needs a CUDA device and RAM for three times the weights. On a CPU only ours and resident
run, on small models, which tries the script and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from report import Report
from stream_ram_sides import FREE, STEERED, Room, Side, ours, resident
from stream_subjects import Subject, flux, llama
from stream_system import anonymous_bytes_of, available_bytes
from torch import nn

from overflowml_core.units import parse_bytes

LLAMA_SHARE = 0.3
"""Of the RAM that is available: the weights wait there, and a side may pin them once or twice more."""
_SETTLED = 10
"""Passes of the endurance test that do not count: caches fill, and close plans are tried."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        device: that computes.
        budgets: text, as the user gave it and figures are named, and bytes.
        reserve_bytes: of each budget for activations.
        edge: of FLUX's image, in pixels.
        steps: timed in each turn.
        rounds: turns of each side.
        soak: passes of the endurance test.
        small: models of a few MB.
    """

    device: torch.device
    budgets: tuple[tuple[str, int], ...]
    reserve_bytes: int
    edge: int = 1024
    steps: int = 3
    rounds: int = 2
    soak: int = 100
    small: bool = False

    @property
    def accelerated(self) -> bool:
        """Whether the device has memory and streams of its own."""
        return self.device.type != "cpu"

    def room(self, budget_bytes: int) -> Room:
        """Of a side under a budget."""
        return Room(self.device, budget_bytes, self.reserve_bytes)


def settings_of(options: argparse.Namespace) -> Settings:
    """From the command line."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    small = options.quick or device.type == "cpu"
    return Settings(
        device=device,
        budgets=tuple((text, parse_bytes(text, "--budgets")) for text in options.budgets.split(",")),
        reserve_bytes=parse_bytes(options.reserve, "--reserve"),
        edge=128 if small else 1024,
        soak=options.soak,
        small=small,
    )


@dataclass
class Turns:
    """What the turns of one side under one budget showed.

    Attributes:
        seconds: of each timed step.
        peak_bytes: most that torch's allocator gave out, loading included.
        streamed_bytes: a pass, by ours' own account.
        output: of the last step, on the CPU.
        error: why there is no more.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    streamed_bytes: int = 0
    output: torch.Tensor | None = None
    error: str = ""

    @property
    def step_s(self) -> float:
        """Median of the steps."""
        return statistics.median(self.seconds)


def measure(settings: Settings, report: Report, notes: list[str]) -> list[tuple[str, str]]:
    """Run both subjects and add their figures. Returns titles and tables."""
    tables = []
    for number in range(2):
        if number == 0:
            subject = flux(settings.device, settings.edge, settings.small)
        else:
            subject = llama(settings.device, int((available_bytes() or 0) * LLAMA_SHARE), settings.small)
        tables.append((f"From RAM: {subject.name or 'flux.'}"[:-1], _measure(subject, settings, report, notes)))
        del subject
        _sweep(settings.device)
    return tables


def _measure(subject: Subject, settings: Settings, report: Report, notes: list[str]) -> str:
    turns: dict[tuple[str, str], Turns] = {}
    rates: list[float] = []
    entries: list[tuple[str, str, Side, Room]] = [("resident", "", resident, settings.room(0))]
    if settings.accelerated:
        entries += [(name, "", side, settings.room(0)) for name, side in FREE.items()]
    steered = STEERED if settings.accelerated else {"ours": ours}
    for text, budget_bytes in settings.budgets:
        entries += [(name, text, side, settings.room(budget_bytes)) for name, side in steered.items()]
    for number in range(settings.rounds):
        if settings.accelerated:
            rates.append(link_rate(settings.device, 2**20 if settings.small else 2**30))
        for name, text, side, room in entries if number % 2 == 0 else entries[::-1]:
            _turn(turns.setdefault((name, text), Turns()), side, subject, room, settings)
    for (name, text), found in turns.items():
        if found.error:
            notes.append(f"ram.{subject.name}{text or 'free'}.{name}: {found.error}")
            print(notes[-1], file=sys.stderr, flush=True)
    rate = statistics.median(rates) if rates else None
    add_figures(report, subject, settings, turns, rate)
    _soak(subject, settings, report, notes)
    return table(turns)


def _turn(found: Turns, side: Side, subject: Subject, room: Room, settings: Settings) -> None:
    """One turn of a side; a side that failed is left out from then on."""
    if found.error:
        return
    model = subject.shell()
    module = torch.get_device_module(room.device)
    if settings.accelerated:
        module.reset_peak_memory_stats()
    try:
        with side(model, subject, room) as attachment:
            seconds, output = run_steps(model, subject, room.device, settings.steps)
            if attachment is not None:
                measured = attachment.report()
                found.streamed_bytes = measured.streamed_bytes
                found.peak_bytes = max(found.peak_bytes, measured.device_peak_bytes)
        found.seconds += seconds
        found.output = output
        if settings.accelerated:
            found.peak_bytes = max(found.peak_bytes, int(module.max_memory_allocated()))
    except Exception as error:  # noqa: BLE001 -- whatever a side fails with is its result
        found.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        del model
        _sweep(room.device)


def _sweep(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def run_steps(model: nn.Module, subject: Subject, device: torch.device, count: int) -> tuple[list[float], torch.Tensor]:
    """Seconds of each step after two to warm up, from end to end on the computing stream, and the last output on the CPU.

    The host waits only at the end, as in a denoising loop: what is fetched ahead for the next step is that step's time.
    """
    clock = Clock(device)
    with torch.inference_mode():
        for _ in range(2):
            output = subject.result(model(**subject.arguments))
        clock.mark()
        for _ in range(count):
            output = subject.result(model(**subject.arguments))
            clock.mark()
        return clock.seconds(), output.to("cpu", copy=True)


class Clock:
    """Marks on the computing stream of a device, or in the host's time where there are no streams."""

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device) if device.type != "cpu" else None
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note when the work that was given to the device so far is done."""
        if self._module is None:
            self._marks.append(time.perf_counter())
            return
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream())
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between neighbouring marks; waits for the last."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._module is None:
            return [end - start for start, end in pairs]
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def link_rate(device: torch.device, nbytes: int = 2**30) -> float:
    """Bytes a second of a pinned copy to the device, median of five."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    clock = Clock(device)
    target.copy_(source, non_blocking=True)
    clock.mark()
    for _ in range(5):
        target.copy_(source, non_blocking=True)
        clock.mark()
    return nbytes / statistics.median(clock.seconds())


def add_figures(
    report: Report, subject: Subject, settings: Settings, turns: dict[tuple[str, str], Turns], rate_bytes_per_s: float | None
) -> None:
    """Ours at each budget against the limit and the peers."""
    prefix = f"ram.{subject.name}"
    timed = {key: found for key, found in turns.items() if found.seconds and not found.error}
    report.add(f"{prefix}weights_bytes", subject.weight_bytes, "bytes")
    if rate_bytes_per_s is not None:
        report.add(f"{prefix}link_rate", rate_bytes_per_s, "bytes/s")
    for (name, text), found in timed.items():
        report.add(".".join(part for part in (prefix.rstrip("."), text, name, "step_s") if part), found.step_s, "s")
    whole = timed.get(("resident", ""))
    for text, budget_bytes in settings.budgets:
        mine = timed.get(("ours", text))
        if mine is None:
            continue
        report.add(f"{prefix}{text}.streamed_bytes", mine.streamed_bytes, "bytes a pass")
        report.add(f"{prefix}{text}.peak_over_budget", mine.peak_bytes / budget_bytes, "ratio")
        if rate_bytes_per_s is not None:
            # Where not everything fits the device, the link alone is the limit: too strict a one, never too lax.
            limit_s = max(whole.step_s if whole else 0.0, mine.streamed_bytes / rate_bytes_per_s)
            if limit_s > 0:
                report.add(f"{prefix}{text}.over_limit", mine.step_s / limit_s, "ratio")
        if whole is not None and whole.output is not None and mine.output is not None:
            report.add(f"{prefix}{text}.max_abs_difference", float((whole.output - mine.output).abs().max()), "from resident")
        peers = {"sequential": ("sequential",), "group": ("group_block", "group_leaf"), "mmgp": ("mmgp",)}
        for peer, names in peers.items():
            # The fastest of a peer's ways that keep the budget, or of all where none does.
            there = [found for (name, at), found in timed.items() if name in names and at in ("", text)]
            within = [found for found in there if found.peak_bytes <= budget_bytes] or there
            if within:
                report.add(f"{prefix}{text}.vs_{peer}", min(found.step_s for found in within) / mine.step_s, "times as fast")


def _soak(subject: Subject, settings: Settings, report: Report, notes: list[str]) -> None:
    """Many passes in one go under the smallest budget that fits: memory must not grow, time must not drift."""
    prefix = f"ram.{subject.name}soak"
    if settings.soak < 2 * _SETTLED:
        notes.append(f"{prefix}: left out; give --soak {2 * _SETTLED} or more")
        return
    for text, budget_bytes in sorted(settings.budgets, key=lambda budget: budget[1]):
        model = subject.shell()
        try:
            with ours(model, subject, settings.room(budget_bytes)):
                _endure(model, subject, settings, report, prefix)
            return
        except Exception as error:  # noqa: BLE001 -- a budget that is too small for this model is no reason to end the run
            notes.append(f"{prefix} under {text}: {type(error).__name__}: {error}")
        finally:
            del model
            _sweep(settings.device)


def _endure(model: nn.Module, subject: Subject, settings: Settings, report: Report, prefix: str) -> None:
    module = torch.get_device_module(settings.device)

    def taken() -> tuple[int, int]:
        on_device = int(module.memory_allocated()) if settings.accelerated else 0
        return on_device, anonymous_bytes_of() or 0

    run_steps(model, subject, settings.device, _SETTLED)
    before = taken()
    seconds, _ = run_steps(model, subject, settings.device, settings.soak)
    after = taken()
    tenth = max(1, len(seconds) // 10)
    report.add(f"{prefix}.passes", len(seconds), "passes")
    report.add(f"{prefix}.device_growth_bytes", after[0] - before[0], "bytes")
    report.add(f"{prefix}.host_growth_bytes", after[1] - before[1], "bytes")
    report.add(f"{prefix}.drift", statistics.median(seconds[-tenth:]) / statistics.median(seconds[:tenth]), "last tenth over first")


def table(turns: dict[tuple[str, str], Turns]) -> str:
    """The turns as Markdown."""
    lines = ["| budget | side | step, median | least to most | peak on the device | |", "|---|---|---|---|---|---|"]
    for (name, text), found in turns.items():
        if found.seconds:
            spread = f"{min(found.seconds):.4f} to {max(found.seconds):.4f} s"
            lines.append(f"| {text} | {name} | {found.step_s:.4f} s | {spread} | {found.peak_bytes / 1e9:.2f} GB | {found.error} |")
        else:
            lines.append(f"| {text} | {name} | | | | {found.error.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
