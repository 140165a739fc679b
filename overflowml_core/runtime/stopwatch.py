"""Measures the passes of one component while it runs: what each block computes and waits, and how fast its copies are.

On a device with streams events mark the times and the host waits for none of them until somebody asks; elsewhere the host's clock does.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from overflowml_core.facts import Tier
from overflowml_core.measured import BlockTime, MeasuredPass
from overflowml_core.runtime.compiling import keep_out_of_graphs
from overflowml_core.runtime.device import Device, StreamDevice
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import Home
from overflowml_core.runtime.phase import Phase

_ENOUGH, _MOST = 2, 4
"""Passes of a kind that are measured, and how many where they differ by more than ``_EVEN``."""

_EVEN = 1.1

_BOUND = 0.1
"""Of a pass: with less of it spent on waiting, a reader may have waited for slots, and its time says nothing of the disk."""

Kind = tuple[object, ...]
"""What tells passes apart that are not compared: shape and dtype of the first tensor that a component is called with."""


def kind_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kind:
    """The kind of a pass by what the component is called with. Masks and caches that grow from pass to pass leave it as it is."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    return () if first is None else (*first.shape, first.dtype)


class _HostClock:
    """Marks are the host's own times."""

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return float(end - start)

    def settle(self) -> None:
        pass


class _EventClock:
    """Marks are events among what a device was given to do."""

    def __init__(self, device: StreamDevice) -> None:
        self._device = device

    def new(self) -> Any:
        return self._device.module.Event(enable_timing=True)

    def mark(self) -> Any:
        event = self.new()
        self._device.record(event)
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def settle(self) -> None:
        self._device.synchronize()


def can_measure(device: Device) -> bool:
    """Whether a device tells times: one with streams, or RAM. Copies in order with the computing (MPS) leave nothing to see."""
    return device.on_host or isinstance(device, StreamDevice)


@dataclass(slots=True)
class _Call:
    """One call of a block: when it was asked for, when it began to compute, and when it was through."""

    block: str
    asked: Any
    began: Any
    ended: Any = None


@dataclass(slots=True)
class _Pass:
    """One pass under way or over."""

    kind: Kind
    is_steady: bool
    began: Any
    calls: list[_Call] = field(default_factory=list)
    ended: Any = None


@dataclass(slots=True)
class _Feed:
    """One block on its way: where from, how many bytes, and between which marks."""

    tier: Tier
    nbytes: int
    began: Any
    ended: Any


class _TimedDevice:
    """Stands before a device and marks the copies of whole blocks from RAM."""

    def __init__(self, device: Device, clock: _EventClock, homes: Iterable[Home], feeds: list[_Feed]) -> None:
        self._device = device
        self._clock = clock
        self._tiers = {home.host.untyped_storage().data_ptr(): home.tier for home in homes if home.host is not None}
        self._feeds = feeds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any], done: Any) -> None:
        """See :meth:`Device.copy`."""
        began, ended = self._clock.new(), self._clock.new()
        # The first byte ahead of the others marks where the copy engine is through with what was before, and the slot is free.
        self._device.copy(target[:1], source[:1], after, began)
        self._device.copy(target, source, after, done)
        self._device.record_copies(ended)
        self._feeds.append(_Feed(self._tiers.get(source.untyped_storage().data_ptr(), Tier.DEVICE), target.numel(), began, ended))


class _TimedFeeder:
    """Stands before a feeder and marks the reads of whole blocks from disk."""

    def __init__(self, feeder: Feeder, feeds: list[_Feed]) -> None:
        self._feeder = feeder
        self._feeds = feeds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._feeder, name)

    def feed(self, home: Home, target: torch.Tensor, after: Sequence[Any], done: Any) -> None:
        """See :meth:`Feeder.feed`."""
        began = time.perf_counter()
        self._feeder.feed(home, target, after, done)
        if home.tier is Tier.DISK:
            self._feeds.append(_Feed(Tier.DISK, home.slab.nbytes, began, time.perf_counter()))


class Stopwatch:
    """Measures passes of one component until it has seen enough of one kind.

    Args:
        device: what computes.
        phase: of the component.
        component: its name.
        blocks: its blocks by name.
        kind: measure passes of this kind alone; the first that repeats where None.
    """

    def __init__(self, device: Device, phase: Phase, component: str, blocks: Mapping[str, nn.Module], kind: Kind | None = None) -> None:
        self._clock: _HostClock | _EventClock = _EventClock(device) if isinstance(device, StreamDevice) else _HostClock()
        self._phase = phase
        self._component = component
        self._kind = kind
        self._feeds: list[_Feed] = []
        self._passes: dict[Kind, list[_Pass]] = {}
        self._seen: set[Kind] = set()
        self._present: _Pass | None = None
        self._thread = 0
        self.pass_count = 0
        """Passes begun since this watch was started."""
        self._streamer = streamer = phase.streamer
        self._before = streamer.device, streamer.feeder
        streamer.feeder = cast("Feeder", _TimedFeeder(streamer.feeder, self._feeds))
        if isinstance(self._clock, _EventClock):
            streamer.device = cast("Device", _TimedDevice(device, self._clock, streamer.homes, self._feeds))
        self._hooks = [handle for name, module in blocks.items() for handle in self._hook(name, module)]

    def stop(self) -> None:
        """Measure no more. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._streamer.device, self._streamer.feeder = self._before

    def _hook(self, name: str, module: nn.Module) -> Iterable[RemovableHandle]:
        asked: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._is_watched():
                asked[:] = [self._clock.mark()]

        def ready(module: nn.Module, args: tuple[Any, ...]) -> None:
            if asked and self._present is not None and self._is_watched():
                self._present.calls.append(_Call(name, asked.pop(), self._clock.mark()))

        def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if self._present is not None and self._present.calls and self._present.calls[-1].ended is None and self._is_watched():
                self._present.calls[-1].ended = self._clock.mark()

        for hook in (before, ready, after):
            keep_out_of_graphs(hook)
        # Around the engine's own: asked for before it waits, begun when it has, and through before it lets the slot go.
        yield module.register_forward_pre_hook(before, prepend=True)
        yield module.register_forward_pre_hook(ready)
        yield module.register_forward_hook(after, prepend=True)

    def _is_watched(self) -> bool:
        return self._present is not None and threading.get_ident() == self._thread

    def begin_pass(self, kind: Kind) -> None:
        """A pass begins in the calling thread; one that is still open was broken off."""
        self.pass_count += 1
        # The first of a kind warms up; one that brings its phase in is no pass in the rhythm of many.
        steady = kind in self._seen and self._phase.is_present
        self._seen.add(kind)
        self._thread = threading.get_ident()
        self._present = _Pass(kind, steady and self._kind in (None, kind), self._clock.mark())

    def end_pass(self) -> None:
        """The pass of the calling thread is over."""
        ended, self._present = self._present, None
        if ended is not None and ended.is_steady and all(call.ended is not None for call in ended.calls):
            ended.ended = self._clock.mark()
            self._passes.setdefault(ended.kind, []).append(ended)

    def result(self) -> tuple[Kind, MeasuredPass] | None:
        """The kind that was seen often enough and what it takes; None as long as there is none. Waits for the device."""
        for kind, passes in self._passes.items():
            if len(passes) >= _ENOUGH:
                self._clock.settle()
                lengths = [self._clock.seconds(one.began, one.ended) for one in passes]
                if len(passes) >= _MOST or max(lengths) <= _EVEN * min(lengths):
                    return kind, self._measured(passes, statistics.median(lengths))
        return None

    def _measured(self, passes: list[_Pass], pass_s: float) -> MeasuredPass:
        seconds = self._clock.seconds
        computed: dict[str, list[float]] = {}
        for one in passes:
            for name in {call.block for call in one.calls}:
                own = [seconds(call.began, call.ended) for call in one.calls if call.block == name]
                computed.setdefault(name, []).append(sum(own))
        counts = {name: sum(call.block == name for call in passes[-1].calls) for name in computed}
        blocks = tuple(BlockTime(name, statistics.median(computed[name]), max(1, counts[name])) for name in computed)
        stall_s = statistics.median(sum(max(0.0, seconds(call.asked, call.began)) for call in one.calls) for one in passes)
        outside_s = max(0.0, pass_s - stall_s - sum(block.compute_s for block in blocks))
        on_events = isinstance(self._clock, _EventClock)
        waits = not on_events or stall_s > _BOUND * pass_s
        return MeasuredPass(
            component=self._component,
            passes=len(passes),
            pass_s=pass_s,
            outside_s=outside_s,
            stall_s=stall_s,
            blocks=blocks,
            h2d_bytes_per_s=self._median_rate(Tier.PINNED) if on_events else 0.0,
            pageable_h2d_bytes_per_s=self._median_rate(Tier.RAM) if on_events else 0.0,
            disk_bytes_per_s=_busy_rate([feed for feed in self._feeds if feed.tier is Tier.DISK]) if waits else 0.0,
        )

    def _median_rate(self, tier: Tier) -> float:
        """Of single copies, each on an engine that has nothing else to do."""
        rates = []
        for feed in self._feeds:
            if feed.tier is tier and feed.nbytes and (copied_s := self._clock.seconds(feed.began, feed.ended)) > 0:
                rates.append(feed.nbytes / copied_s)
        return statistics.median(rates) if rates else 0.0


def _busy_rate(feeds: list[_Feed]) -> float:
    """Bytes over the time in which at least one read was under way; 0 where nothing was read."""
    busy_s = until_s = 0.0
    for feed in sorted(feeds, key=lambda feed: feed.began):
        busy_s += max(0.0, feed.ended - max(feed.began, until_s))
        until_s = max(until_s, feed.ended)
    return sum(feed.nbytes for feed in feeds) / busy_s if busy_s > 0 else 0.0
