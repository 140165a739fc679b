"""Runs the routed experts of one phase: who is asked for is brought in, computed as it arrives, and may stay for the next token.

Note [a pass of a bank]. Those that are in the cache compute first; meanwhile all others are requested at once, as far as there are slots,
and each computes when it is there. Results are put where the order of experts has them and added up at the end, so that what comes out does
not depend on what was in the cache. Behind its own requests come those that the next bank is expected to make.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import PlanMismatch, Unsupported
from overflowml_core.expert_report import ExpertReport
from overflowml_core.expert_setting import ExpertSetting
from overflowml_core.facts import Tier
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.experts.arithmetic import expert_output, summed_by_expert, summed_by_token
from overflowml_core.runtime.experts.bank_home import BankHome
from overflowml_core.runtime.experts.cache import ExpertCache, Slot
from overflowml_core.runtime.experts.counts import BankCounts, Counts
from overflowml_core.runtime.experts.encoded import Operand, operands_of
from overflowml_core.runtime.experts.fetcher import SOON
from overflowml_core.runtime.experts.foresight import Foresight
from overflowml_core.runtime.experts.policy import FIRST_HALF_LIFE, HALF_LIVES, Ghosts, Ranking, Scores
from overflowml_core.runtime.experts.processor import Division
from overflowml_core.runtime.experts.seat import Seat, slot_bytes
from overflowml_core.runtime.experts.tryout import Tryout
from overflowml_core.runtime.feeder import Feeder


class Conductor:
    """The routed experts of one phase."""

    def __init__(self, device: Device, feeder: Feeder, cache_bytes: int, setting: ExpertSetting) -> None:
        """Conduct no bank yet.

        Args:
            device: what computes.
            feeder: brings experts in.
            cache_bytes: of the device for the cache.
            setting: how experts are run.
        """
        self.device = device
        self.seats: list[Seat] = []
        self.counts = Counts()
        self._feeder = feeder
        self._cache_bytes = cache_bytes
        self._setting = setting
        self._scores = Scores(0, setting.half_life or FIRST_HALF_LIFE, () if setting.half_life else HALF_LIVES)
        self._ranking = Ranking(self._scores.levels)
        self._cache: ExpertCache | None = None
        self._ghosts: Ghosts | None = None
        self.lock = threading.RLock()
        """Held while a bank runs: one at a time, whoever calls."""
        self._looking = Tryout()
        """Whether looking ahead pays for single tokens: what is brought in for nothing may cost more than what comes early gains."""
        self._began, self._last_tokens = 0.0, 0
        self._ended = 0.0
        """When the bank before ended."""
        self._fetch_bytes_per_s = setting.fetch_bytes_per_s
        self._division = Division(setting.fetch_bytes_per_s, setting.cpu_bytes_per_s)

    def seat(self, home: BankHome, component: str, block: str, per_token: int, router: nn.Module | None) -> int:
        """Add a bank, in order of execution.

        Args:
            home: where its experts wait.
            component, block: whose experts.
            per_token: how many a token is routed to.
            router: of the bank, None where nobody knows it.

        Returns:
            Its place.
        """
        bank = home.bank
        first = self.seats[-1].numbers.stop if self.seats else 0
        foresight = Foresight(router, bank.count, per_token) if router is not None else None
        self.seats.append(Seat(home, first, foresight, home.version))
        self.counts.banks.append(BankCounts(component, block, per_token, home.record_bytes, [0] * bank.count))
        self._scores.extend(bank.count)
        for expert, share in enumerate(self._setting.heat.get((component, block), ())[: bank.count]):
            self._scores.seed(first + expert, share)
        return len(self.seats) - 1

    @property
    def is_open(self) -> bool:
        """Whether the cache has its memory."""
        return self._cache is not None and self._cache.is_open

    def open(self) -> None:
        """Take the memory of the cache.

        Raises:
            torch.OutOfMemoryError: the device has no room; nothing stays allocated.
        """
        with self.lock:
            if self._cache is None and self.seats:
                size = slot_bytes(max(seat.home.record_bytes for seat in self.seats), self.device.on_host)
                if self._cache_bytes < size:
                    raise PlanMismatch(f"a cache of {self._cache_bytes} bytes holds no expert of {size}; make a plan for this model")
                homes = [home for seat in self.seats for home in seat.home.homes]
                self._cache = ExpertCache(self.device, self._feeder, homes, self._ranking, (self._cache_bytes // size, size))
                if self._setting.half_life is None:
                    self._ghosts = Ghosts(self._scores, [seat.numbers for seat in self.seats], self._cache.slot_count)
            if self._cache is not None:
                self._cache.open()

    def close(self) -> None:
        """Give the memory of the cache back. A second call does nothing."""
        with self.lock:
            if self._cache is not None:
                self._cache.close()

    # ---- computing

    def run(self, place: int, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The output of a bank behind transformers' experts interface.

        Args:
            place: of the bank.
            module: that is called.
            hidden: (tokens, hidden).
            index: (tokens, k) experts of each token; numbers from the count on stand for none.
            weights: (tokens, k) of routing.

        Returns:
            (tokens, hidden)

        Raises:
            ReadFault: a file of the model is gone or shorter than it was; the next call tries again.
        """
        with self.lock, torch.no_grad():
            seat = self.seats[place]
            self.begin(place, hidden.shape[0])
            ids, order = torch.sort(index.reshape(-1))
            given, expected = self._routing(place, hidden, ids)
            x = hidden[order // index.shape[1]]
            ends: dict[int, int] = {}
            end = 0
            for expert, count in given.items():
                end += count
                ends[expert] = end
            outputs: torch.Tensor | None = None
            for expert, tensors in self.each(place, given, hidden.shape[0], expected):
                rows = slice(ends[expert] - given[expert], ends[expert])
                if tensors is None:
                    made = self._on_processor(seat, module, expert, x[rows])
                else:
                    made = expert_output(module, x[rows], tensors)
                if outputs is None:
                    # Rows behind the last expert belong to none.
                    outputs = made.new_zeros(x.shape[0], made.shape[1])
                outputs[rows] = made
            if outputs is None:
                return torch.zeros_like(hidden)
            if seat.adds_by_expert:
                return summed_by_expert(outputs, order, weights, hidden, list(ends.values()))
            return summed_by_token(outputs, order, weights, hidden)

    def _routing(self, place: int, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[dict[int, int], list[int]]:
        """By expert how many tokens it is given, in the order of their numbers; and the experts of the next bank that are expected, the
        most wanted first."""
        choices = self._choices(place + 1, hidden)
        asked = ids.tolist() if choices is None else torch.cat((ids, choices.reshape(-1).to(ids.dtype))).tolist()
        count = self.seats[place].home.bank.count
        given: dict[int, int] = {}
        for expert in asked[: ids.numel()]:
            if 0 <= expert < count:
                given[expert] = given.get(expert, 0) + 1
        wanted: dict[int, int] = {}
        for expert in asked[ids.numel() :]:
            wanted[expert] = wanted.get(expert, 0) + 1
        return given, sorted(wanted, key=lambda expert: -wanted[expert])

    def _choices(self, place: int, hidden: torch.Tensor) -> torch.Tensor | None:
        if not self._setting.looks_ahead or place >= len(self.seats) or (hidden.shape[0] == 1 and not self._looking.choice):
            return None
        foresight = self.seats[place].foresight
        return None if foresight is None else foresight.choices(hidden)

    def _on_processor(self, seat: Seat, module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The output of an expert that is computed where it waits."""
        home = seat.home.homes[expert]
        started = time.perf_counter()
        tensors = operands_of(home.slab, home.host) if home.host is not None else ()
        made = expert_output(module, x.to("cpu"), tensors, normed=False)
        self._division.saw(home.slab.nbytes, time.perf_counter() - started)
        made = made.to(x.device)
        return module.post_expert_norm(made) if getattr(module, "has_post_expert_norm", False) else made

    def each(
        self, place: int, given: dict[int, int], tokens: int, expected: Sequence[int] = ()
    ) -> Iterator[tuple[int, tuple[Operand, ...] | None]]:
        """Each expert that is asked for, as soon as it can compute, with its tensors on the device; None for those that the processor
        shall compute. What is computed with one must be queued before the next is taken.

        Args:
            place: of the bank.
            given: by expert, how many tokens it is given.
            tokens: of the pass.
            expected: experts that the next bank may ask for, the most wanted first.
        """
        cache, seat = self._cache, self.seats[place]
        if cache is None or not cache.is_open:
            raise Unsupported(f"{seat.home.bank.name}: its experts are called while the model is not on the device; call the whole model")
        self._begin(place, given, tokens)
        first = seat.first
        there = deque(e for e in given if cache.find(first + e) is not None)
        missed = deque(e for e in given if cache.find(first + e) is None)
        self._note(place, cache, there, len(given), tokens)
        here = self._here(cache, seat, missed, given, tokens)
        held = {first + e for e in given if e not in here}
        coming: deque[tuple[int, Slot]] = deque()
        started, asked_bytes = time.perf_counter(), 0
        waited = False
        while there or missed or coming:
            while missed:
                slot = cache.request(first + missed[0], held)
                if slot is None:
                    break
                coming.append((missed.popleft(), slot))
                asked_bytes += seat.home.record_bytes
            if not missed and expected:
                self._expect(place + 1, cache, expected, held)
                expected = ()
            if not there:
                while here:
                    yield here.pop(), None
            if missed and not there and not coming:
                cache.wait_for_one()
                continue
            expert, slot = self._next(cache, first, there, coming)
            if not cache.is_here(slot):
                waited = True
                stalled = time.perf_counter()
                if slot.job is not None:
                    slot.job.wait()
                self.counts.stall_s += time.perf_counter() - stalled
            cache.settle(slot)
            yield expert, slot.tensors
            cache.release(slot)
            held.discard(first + expert)
        if expected:
            self._expect(place + 1, cache, expected, held)
        while here:
            yield here.pop(), None
        self._ended = time.perf_counter()
        if waited and asked_bytes:
            self._saw_rate(asked_bytes / (self._ended - started))
        self.counts.banks[place].fetched_bytes += asked_bytes

    def _next(self, cache: ExpertCache, first: int, there: deque[int], coming: deque[tuple[int, Slot]]) -> tuple[int, Slot]:
        """The next expert to compute: one that is here; else the one that was asked for first."""
        for _ in range(len(there)):
            slot = cache.find(first + there[0])
            if slot is not None and cache.is_here(slot):
                return there.popleft(), slot
            there.rotate(-1)
        for number, (expert, slot) in enumerate(coming):
            if cache.is_here(slot):
                del coming[number]
                return expert, slot
        if there:
            expert = there.popleft()
            slot = cache.request(first + expert, ())
            if slot is not None:
                return expert, slot
        return coming.popleft()

    def begin(self, place: int, tokens: int) -> None:
        """A pass of this many tokens has come to a bank."""
        if place == 0:
            now = time.perf_counter()
            if tokens == 1 and self._last_tokens == 1:
                self._looking.saw(now - self._began)
            self._began, self._last_tokens = now, tokens
            self.counts.tokens += tokens
            self.counts.passes += 1

    def _begin(self, place: int, given: dict[int, int], tokens: int) -> None:
        """Count a pass of a bank, and have those who stay in the cache decided by it."""
        seat, counts = self.seats[place], self.counts
        if seat.home.version != seat.version:
            self._renew(seat)
        bank = counts.banks[place]
        bank.requests += len(given)
        numbers = {seat.first + expert: count for expert, count in given.items()}
        for expert, count in given.items():
            bank.tokens[expert] += count
        for number, count in numbers.items():
            self._scores.touch(number, tokens, count, counts.tokens)
            if number in self._ranking.cached:
                self._ranking.renew(number)
        is_followed = self._ghosts is not None and place in self._ghosts.followed
        if is_followed and self._ghosts is not None and self._ghosts.request(numbers, 2 * len(given) <= seat.home.bank.count):
            self._ranking.rank_by(self._scores.levels)
        if seat.foresight is not None and self._ended:
            seat.foresight.saw_idle(time.perf_counter() - self._ended)

    def _renew(self, seat: Seat) -> None:
        """Somebody wrote into the weights of a bank."""
        if seat.home.is_converted or seat.home.tier is Tier.DISK:
            kind, remedy = ("stay on disk", ", or give it host memory for its experts")
            if seat.home.is_converted:
                kind, remedy = ("are in a format of fewer bits", ", or load it with quality='lossless'")
            raise Unsupported(
                f"{seat.home.bank.name}: weights of experts that {kind} were changed in place, and would be used unchanged; release the "
                f"model first{remedy}"
            )
        if self._cache is not None:
            self._cache.drop(seat.numbers)
        seat.version = seat.home.version

    def _note(self, place: int, cache: ExpertCache, there: Sequence[int], asked: int, tokens: int) -> None:
        seat = self.seats[place]
        useful = 0
        for expert in there:
            slot = cache.find(seat.first + expert)
            if slot is not None and slot.expected:
                slot.expected = False
                useful += 1
        self.counts.banks[place].hits += len(there) - useful
        self.counts.prefetch_hits += useful
        if tokens == 1:
            self.counts.token_requests += asked
            self.counts.token_hits += len(there) - useful
        if seat.foresight is not None:
            wasted, cache.wasted = cache.wasted, 0
            seat.foresight.learn(useful, wasted)

    def _here(self, cache: ExpertCache, seat: Seat, missed: deque[int], given: dict[int, int], tokens: int) -> list[int]:
        """Take those out of the missed experts that the processor computes where they wait."""
        if self.device.on_host or not self._division.is_possible or not missed or not seat.home.bank.is_stacked:
            return []
        homes = seat.home.homes
        able = [e for e in missed if homes[e].host is not None]
        chosen = self._division.for_processor(
            able, given, homes[0].slab.nbytes, self.counts.banks[0].per_token, seat.home.bank.count, tokens
        )
        for expert in chosen:
            missed.remove(expert)
        self.counts.on_cpu += len(chosen)
        return chosen

    def _expect(self, place: int, cache: ExpertCache, expected: Sequence[int], held: set[int]) -> None:
        """Bring in experts of the next bank, as many as come in while nothing else does."""
        seat = self.seats[place]
        if seat.foresight is None:
            return
        left = seat.foresight.allowance(seat.home.record_bytes, self._fetch_bytes_per_s)
        kept = held | {seat.first + expert for expert in expected}
        for expert in expected:
            if left <= 0:
                break
            if cache.find(seat.first + expert) is None:
                if cache.request(seat.first + expert, kept, SOON) is None:
                    break
                self.counts.prefetched += 1
                self.counts.banks[place].fetched_bytes += seat.home.record_bytes
                left -= 1

    def _saw_rate(self, bytes_per_s: float) -> None:
        known = self._fetch_bytes_per_s
        self._fetch_bytes_per_s = bytes_per_s if not known else known + 0.1 * (bytes_per_s - known)

    # ---- report

    def report(self) -> ExpertReport | None:
        """What was counted; None where there are no banks."""
        if not self.seats:
            return None
        with self.lock:
            cache, counts = self._cache, self.counts
            cached = set(cache.experts) if cache is not None else set()
            banks = tuple(
                bank.report(tuple(number - seat.first for number in seat.numbers if number in cached))
                for bank, seat in zip(counts.banks, self.seats, strict=True)
            )
            return ExpertReport(
                banks,
                counts.tokens,
                counts.passes,
                cache.slot_count if cache is not None else 0,
                cache.slot_bytes if cache is not None else 0,
                counts.stall_s,
                counts.prefetched,
                counts.prefetch_hits,
                counts.on_cpu,
                self._scores.half_life,
                counts.token_requests,
                counts.token_hits,
            )
