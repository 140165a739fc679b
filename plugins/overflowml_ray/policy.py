"""Says which task goes to which worker next: values and arithmetic alone. Knows no clock, no network and no Ray.

Note [pulled]. A worker is granted a task when it has room: one that it computes, and one ahead so that it need not wait for the network.
So a worker that is twice as fast is granted twice as many, and nobody has to know how fast it is.

Note [the end]. Near the end a worker that is free may be the wrong one: what it begins now, another would finish sooner. All that is left
can be done by the time T at which the whole tasks that each worker could finish by then add up to what is left. A worker is granted a
task only if it would finish it by T; otherwise the others will be done by T without it. While so much is left that T is further off than
any task takes, the sum of the rates says so without a search.

Note [copies]. Once everything is granted, a worker without work computes a second copy of the task that is expected last, if it would be
done sooner. The result that comes first counts, and the other copy is taken back where it has not begun. A task has two copies at most.

Note [each once]. A task is waiting, held by one or two workers, or done. Of the results of a task the first one is told that it counts,
whoever sends it; a worker that is gone gives back what it held, once, unless somebody else holds a copy.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_SMOOTHING = 0.3
"""Weight of the last task in what a worker is expected to take: workers get faster and slower while they run."""
_GAIN = 1.1
"""A copy is made where it would take this much longer than expected and still be done first."""
_COSTS_APART = 1.1
"""Tasks whose costs are closer are kept in one row."""
_HALVINGS = 12
_AT_ONCE = 50
"""In how many parts of a change of all workers the search for T is made anew; with fewer workers at each event."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A task for a worker; ``is_copy`` where another one computes it already."""

    worker: str
    task: int
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a result.

    Attributes:
        counts: it is the first of its task.
        withdrawn: copies that workers need not begin any more: tell them.
    """

    counts: bool
    withdrawn: tuple[Grant, ...] = ()


@dataclass(slots=True)
class Counts:
    """What happened so far. Messages are grants, results, and copies taken back."""

    messages: int = 0
    copies: int = 0
    redone: int = 0
    superfluous: int = 0


@dataclass(slots=True)
class _Worker:
    name: str
    unit_s: float | None
    """Seconds of a task of cost 1; None until it is known."""
    held: deque[int] = field(default_factory=deque)
    """Granted to it in this order; it computes the first."""
    began_s: float = 0.0
    is_measured: bool = False


class Scheduler:
    """Hands out tasks. Every method takes the time, which must not go back; the same calls give the same answers.

    Attributes:
        counts: of messages and copies.
        done: tasks that have a result that counts.
    """

    def __init__(self, costs: Sequence[float], ahead: int = 1, ends_well: bool = True, copies: bool = True) -> None:
        """Begin with all tasks waiting.

        Args:
            costs: of each task, above zero and in any unit: two of cost 1 take a worker as long as one of cost 2.
            ahead: tasks that a worker holds beyond the one that it computes.
            ends_well: heed note [the end]; without it whoever is free takes what is next.
            copies: heed note [copies].
        """
        if any(not 0 < cost < math.inf for cost in costs):
            raise ValueError("costs must be above zero and finite")
        self._costs = tuple(costs)
        self._ahead, self._ends_well, self._copies = ahead, ends_well, copies
        self._workers: dict[str, _Worker] = {}
        self._room: dict[str, _Worker] = {}
        self._holders: dict[int, list[str]] = {}
        self._losses: dict[int, int] = {}
        self.done: set[int] = set()
        self.counts = Counts()
        self._rows: dict[int, deque[int]] = {}
        self._row_keys: list[int] = []
        self._waiting: set[int] = set()
        self._left_cost = 0.0
        for task in range(len(self._costs)):
            self._put(task, first=False)
        self._rate = 0.0
        self._all_s = self._all_cost = 0.0
        self._end_s: float | None = None
        self._end_age = 0
        self._refused: set[str] = set()

    # ---- what is asked

    @property
    def is_done(self) -> bool:
        """Whether every task has a result."""
        return len(self.done) == len(self._costs)

    @property
    def workers(self) -> tuple[str, ...]:
        """Those that may be granted tasks."""
        return tuple(self._workers)

    def held(self, worker: str) -> tuple[int, ...]:
        """Tasks that a worker was granted and has not answered, the one that it computes first."""
        return tuple(self._workers[worker].held) if worker in self._workers else ()

    def losses(self, task: int) -> int:
        """How often a worker was gone while it computed this task."""
        return self._losses.get(task, 0)

    # ---- what happens

    def join(self, worker: str, now_s: float, unit_s: float | None = None) -> None:
        """A worker is there.

        Args:
            worker: a name that is not in use.
            now_s: the time.
            unit_s: seconds that a task of cost 1 is expected to take it, None where nobody knows.
        """
        if worker in self._workers:
            raise ValueError(f"worker {worker!r} is there already")
        self._workers[worker] = self._room[worker] = _Worker(worker, unit_s, began_s=now_s)
        self._rate += 0.0 if unit_s is None else 1 / unit_s
        self._end_s = None

    def leave(self, worker: str, now_s: float) -> tuple[int, ...]:
        """A worker is gone, or shall get nothing more.

        Returns:
            Tasks that it held and that nobody else holds: they wait again, in front of all others.
        """
        gone = self._workers.pop(worker, None)
        if gone is None:
            return ()
        self._room.pop(worker, None)
        self._rate = sum(1 / one.unit_s for one in self._workers.values() if one.unit_s is not None)
        self._end_s = None
        if gone.held:
            self._losses[gone.held[0]] = self._losses.get(gone.held[0], 0) + 1
        back = tuple(task for task in gone.held if self._let_go(worker, task))
        for task in reversed(back):
            self._put(task, first=True)
        self.counts.redone += len(back)
        return back

    def failed(self, worker: str, task: int, now_s: float) -> bool:
        """A worker says that it could not do a task; it waits again, unless somebody else holds or did it.

        Returns:
            Whether it waits again.
        """
        self.counts.messages += 1
        holder = self._workers.get(worker)
        if holder is None or task not in holder.held:
            return False
        self._answered(holder, task, now_s)
        if not self._let_go(worker, task):
            return False
        self._put(task, first=True)
        self.counts.redone += 1
        return True

    def finished(self, worker: str, task: int, now_s: float, took_s: float | None = None) -> Result:
        """A result came, from whomever: also from a worker that was believed to be gone.

        Args:
            worker: who sends it.
            task: of which.
            now_s: the time.
            took_s: seconds that the worker computed, None to count from when it could begin.
        """
        self.counts.messages += 1
        holder = self._workers.get(worker)
        if holder is not None and task in holder.held:
            if took_s is None and holder.held[0] == task:
                took_s = now_s - holder.began_s
            self._answered(holder, task, now_s)
            if took_s is not None and took_s > 0:
                self._learn(holder, took_s / self._costs[task], took_s, task)
        if task in self.done:
            self.counts.superfluous += 1
            self._let_go(worker, task)
            return Result(False)
        self.done.add(task)
        self._take(task)
        self._let_go(worker, task)
        return Result(True, self._withdraw(task, now_s))

    def grants(self, now_s: float) -> list[Grant]:
        """What to send now. Ask after everything that happened, and now and then where nothing does: who is late is known by that alone."""
        given: list[Grant] = []
        if self._waiting:
            self._end_age += 1
            if self._is_stale():
                self._refused.clear()
            self._grant_waiting(now_s, given)
        if not self._waiting and self._copies:
            self._grant_copies(now_s, given)
        self.counts.messages += len(given)
        return given

    # ---- how it is decided

    def _grant_waiting(self, now_s: float, given: list[Grant]) -> None:
        # Whoever was refused would be again until T is looked for anew: a thousand need not be asked at each event.
        asking = [one for name, one in self._room.items() if name not in self._refused]
        for one in sorted(asking, key=lambda one: (self._free_s(one, now_s) + self._unit_s(one), one.name)):
            while self._waiting and one.name in self._room:
                task = self._fitting(one, now_s)
                if task is None:
                    self._refused.add(one.name)
                    break
                self._give(one, task, now_s, given, is_copy=False)

    def _fitting(self, one: _Worker, now_s: float) -> int | None:
        """The first task of the dearest row that the worker would finish in time."""
        unit_s = self._unit_s(one)
        free_s = self._free_s(one, now_s)
        end_s = math.inf
        if self._ends_well and unit_s > 0 and self._rate > 0:
            surely_s = now_s + self._left_cost / self._rate
            if free_s + unit_s * self._dearest() > surely_s:
                end_s = max(surely_s, self._end(now_s))
        for key in reversed(self._row_keys):
            task = self._rows[key][0]
            if free_s + unit_s * self._costs[task] <= end_s:
                return task
        return None

    def _end(self, now_s: float) -> float:
        """T of note [the end]."""
        if self._end_s is not None and not self._is_stale():
            return self._end_s
        count = len(self._waiting)
        mean, dearest = self._left_cost / count, self._dearest()
        whole = [(self._free_s(one, now_s), self._unit_s(one)) for one in self._workers.values()]
        least = min(free_s + unit_s * dearest for free_s, unit_s in whole)  # whoever is the first to have the dearest
        tasks = [(free_s, unit_s * mean) for free_s, unit_s in whole]
        low, high = now_s, min(free_s + task_s * count for free_s, task_s in tasks)  # one of them alone
        for _ in range(_HALVINGS + count.bit_length()):
            middle = (low + high) / 2
            possible = sum(int((middle - free_s) / task_s) for free_s, task_s in tasks if middle - free_s >= task_s)
            low, high = (low, middle) if possible >= count else (middle, high)
            if high - low <= 1e-3 * (high - now_s):
                break
        self._end_s, self._end_age = max(high, least), 0
        return self._end_s

    def _is_stale(self) -> bool:
        return self._end_s is None or self._end_age * _AT_ONCE >= len(self._workers)

    def _grant_copies(self, now_s: float, given: list[Grant]) -> None:
        idle = sorted((one for one in self._room.values() if not one.held), key=lambda one: (self._unit_s(one), one.name))
        if not idle:
            return
        late: list[tuple[float, int]] = []
        for holder in self._workers.values():
            late_s = 0.0
            for place, task in enumerate(holder.held):
                late_s = self._first_done_s(holder, now_s) if place == 0 else late_s + self._unit_s(holder) * self._costs[task]
                if len(self._holders[task]) == 1 and task not in self.done:
                    late.append((-late_s, task))
        late.sort()
        for one, (minus_s, task) in zip(idle, late, strict=False):
            if now_s + _GAIN * self._unit_s(one) * self._costs[task] >= -minus_s:
                break  # the next one is slower, and the next task is expected sooner
            self._give(one, task, now_s, given, is_copy=True)
            self.counts.copies += 1

    def _first_done_s(self, one: _Worker, now_s: float) -> float:
        """When what a worker computes is expected; one that is late may be so for long."""
        usual_s = self._unit_s(one) * self._costs[one.held[0]]
        late_s = now_s - one.began_s - usual_s
        return now_s - late_s if late_s <= 0 else now_s + late_s / 2 + usual_s / 10

    def _free_s(self, one: _Worker, now_s: float) -> float:
        if not one.held:
            return now_s
        first_s = self._first_done_s(one, now_s)
        if len(one.held) == 1:
            return first_s
        return first_s + self._unit_s(one) * sum(self._costs[task] for task in itertools.islice(one.held, 1, None))

    def _unit_s(self, one: _Worker) -> float:
        """Expected seconds of a task of cost 1; that of all workers where nothing is known of this one, 0 where nothing is known at all."""
        return one.unit_s if one.unit_s is not None else self._all_s / self._all_cost if self._all_cost else 0.0

    # ---- what is kept

    def _give(self, one: _Worker, task: int, now_s: float, given: list[Grant], is_copy: bool) -> None:
        self._take(task)
        if not one.held:
            one.began_s = now_s
        one.held.append(task)
        self._holders.setdefault(task, []).append(one.name)
        self._mark_room(one)
        given.append(Grant(one.name, task, is_copy))

    def _answered(self, holder: _Worker, task: int, now_s: float) -> None:
        if holder.held[0] == task:
            holder.began_s = now_s
        holder.held.remove(task)
        self._mark_room(holder)

    def _mark_room(self, one: _Worker) -> None:
        is_new = one.unit_s is None and not one.is_measured
        if not one.held or (len(one.held) <= self._ahead and not is_new):  # its first task tells how fast it is
            self._room[one.name] = one
        else:
            self._room.pop(one.name, None)

    def _let_go(self, worker: str, task: int) -> bool:
        """Whether nobody holds the task any more and it is not done."""
        holders = self._holders.get(task)
        if holders is None or worker not in holders:
            return False
        holders.remove(worker)
        if holders:
            return False
        del self._holders[task]
        return task not in self.done

    def _withdraw(self, task: int, now_s: float) -> tuple[Grant, ...]:
        """Take back copies of a task that is done, where they have not begun."""
        back: list[Grant] = []
        for name in tuple(self._holders.get(task, ())):
            holder = self._workers[name]
            if holder.held[0] != task:
                self._answered(holder, task, now_s)
                self._let_go(name, task)
                back.append(Grant(name, task))
        self.counts.messages += len(back)
        return tuple(back)

    def _learn(self, one: _Worker, unit_s: float, took_s: float, task: int) -> None:
        self._rate -= 0.0 if one.unit_s is None else 1 / one.unit_s
        one.unit_s = unit_s if one.unit_s is None or not one.is_measured else one.unit_s + _SMOOTHING * (unit_s - one.unit_s)
        self._rate += 1 / one.unit_s
        one.is_measured = True
        self._mark_room(one)
        self._all_s += took_s
        self._all_cost += self._costs[task]

    def _put(self, task: int, first: bool) -> None:
        key = round(math.log(self._costs[task]) / math.log(_COSTS_APART))
        if key not in self._rows:
            self._rows[key] = deque()
            bisect.insort(self._row_keys, key)
        row = self._rows[key]
        row.appendleft(task) if first else row.append(task)
        self._waiting.add(task)
        self._left_cost += self._costs[task]
        if first:
            self._end_s = None

    def _take(self, task: int) -> None:
        if task not in self._waiting:
            return
        key = round(math.log(self._costs[task]) / math.log(_COSTS_APART))
        row = self._rows[key]
        row.popleft() if row[0] == task else row.remove(task)
        if not row:
            del self._rows[key]
            self._row_keys.remove(key)
        self._waiting.discard(task)
        self._left_cost -= self._costs[task]

    def _dearest(self) -> float:
        return self._costs[self._rows[self._row_keys[-1]][0]]
