"""Cuts items into batches that fit, one after the other, while somebody runs them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import TypeVar

from overflowml_core.batches.measure import BudgetWatch, RoomWatch, Watch
from overflowml_core.batches.room import most_that_fit
from overflowml_core.batches.shortage import is_out_of_memory
from overflowml_core.batches.sizer import BatchSizer
from overflowml_core.errors import BadLimits
from overflowml_core.guard import MemoryGuard
from overflowml_core.session import attachment

_log = logging.getLogger("overflowml")

_Item = TypeVar("_Item")

MOST_ITEMS = 64
"""Items of a batch where nobody says; more of them hardly ever make an accelerator faster."""


class Batch(list[_Item]):
    """Some of the items: a list, and a context manager that tells how their run ended.

    ``with batch:`` around the run takes it upon itself if memory runs out there: the error ends in it, and the same items come again in
    smaller batches. A single item is tried twice before its error is raised. Without it, a batch counts as done when the next is asked for.

    Attributes:
        first: index of its first item among all.
        failed: memory ran out in it.
    """

    def __init__(self, items: Iterable[_Item], first: int, is_last_try: bool = False) -> None:
        super().__init__(items)
        self.first = first
        self.failed = False
        self._is_last_try = is_last_try

    def __enter__(self) -> Batch[_Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if not is_out_of_memory(error):
            return False
        self.failed = True
        if not self._is_last_try:
            _log.info("memory ran out in a batch of %d (%s); it is tried again in parts", len(self), str(error).partition("\n")[0])
        return not self._is_last_try


def auto_batch(
    items: Iterable[_Item],
    pipe_or_model: object | None = None,
    batch_size: int | None = None,
    max_batch_size: int = MOST_ITEMS,
    cleanup_between: bool | MemoryGuard = True,
) -> Iterator[Batch[_Item]]:
    """See :func:`overflowml.auto_batch`."""
    if isinstance(items, (str, bytes)):
        raise BadLimits(f"items={items[:40]!r}: a single text; give a list of prompts")
    for name, count in (("batch_size", batch_size), ("max_batch_size", max_batch_size)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise BadLimits(f"{name}={count!r}: batches are counted in whole numbers from 1; leave it out to have it found")
    guard = cleanup_between if isinstance(cleanup_between, MemoryGuard) else MemoryGuard() if cleanup_between else None
    if batch_size is not None:
        return batches(items, BatchSizer(batch_size, batch_size), None, guard)
    plan_at_work = None if pipe_or_model is None else attachment(pipe_or_model)
    predicted = None if plan_at_work is None else most_that_fit(plan_at_work.plan)
    if plan_at_work is None or predicted is None:
        return batches(items, BatchSizer(1, max_batch_size), RoomWatch(), guard)
    # A prediction is a ceiling, too: what is beyond it is over the budget, though the device may have room.
    plan = plan_at_work.plan
    return batches(items, BatchSizer(predicted, min(predicted, max_batch_size)), BudgetWatch(plan.device, plan.budget.device_bytes), guard)


def batches(
    items: Iterable[_Item], sizer: BatchSizer, watch: Watch | None = None, guard: MemoryGuard | None = None
) -> Iterator[Batch[_Item]]:
    """The same with the parts given.

    Args:
        items: whatever.
        sizer: told what happens.
        watch: told of each batch that was done.
        guard: cleans between batches, and always after memory ran out.
    """
    source, waiting = iter(items), deque[_Item]()
    first, failures = 0, 0
    while True:
        waiting.extend(islice(source, max(0, sizer.size - len(waiting))))
        if not waiting:
            return
        batch = Batch(islice(waiting, sizer.size), first, is_last_try=failures > 0 and sizer.size == 1)
        count = len(batch)
        yield batch
        if batch.failed:
            failures += count == 1
            sizer.failed(count)
            if guard is not None:
                guard.clean()
            continue
        failures, first = 0, first + count
        for _ in range(count):
            waiting.popleft()
        sizer.succeeded(count)
        most = None if watch is None else watch.most(count)
        if most is not None:
            sizer.cap(most)
        if guard is not None:
            guard.check()
