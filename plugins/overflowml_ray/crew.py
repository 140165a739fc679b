"""Has a cluster do tasks: keeps a worker at each seat, sends what the policy grants, and hears of results and of ends.

Note [what becomes of a worker]. One whose process or node ends is gone; where the node lives, another process takes its seat. One that
meets a fault is ended and replaced, for nobody knows what the fault left (an accelerator's context is of no more use); after a second
fault without a task in between, and after three ends, its seat is set aside. One that says that it cannot go on is set aside at once. In
each case what it held is done by others, and whoever is set aside is named with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from overflowml_ray.errors import NobodyLeft, TaskFailed, WorkRefused
from overflowml_ray.nodes import Seat, at_node, difference, question, seats_of, versions_here
from overflowml_ray.policy import Counts, Grant, Scheduler
from overflowml_ray.worker import ASIDE, DONE, FAULT, NODE_ASIDE, REFUSED, Answer, Work, Worker

HELLO_S = 120.0
"""How long a node may take to start a process, and to answer."""
_LOOK_S, _TICK_S = 5.0, 0.5
_MOST_ENDS, _MOST_FAULTS, _MOST_LOSSES = 3, 2, 3

Result = Callable[[int, Any], None]
Note = Callable[[str], None]


@dataclass(slots=True)
class _Hired:
    seat: Seat
    actor: Any = None
    since_s: float = 0.0
    ends: int = 0
    faults: int = 0
    tasks: int = 0


@dataclass(slots=True)
class _Call:
    """A call under way: its kind, the seat or node it went to, the actor, and the task."""

    kind: str
    name: str
    actor: Any = None
    task: int = -1


@dataclass(slots=True)
class Summary:
    """What the cluster was like: tasks that each worker did, who was set aside and why, and counts of the policy."""

    tasks: dict[str, int] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


class Crew:
    """Workers of a cluster for one piece of work."""

    def __init__(self, ray: Any, work: Work, payloads: Sequence[Any], names: Callable[[int], str], note: Note) -> None:
        """Nothing is started yet.

        Args:
            ray: the module, connected.
            work: what each worker opens.
            payloads: of each task, as ``Open.do`` takes it.
            names: of a task, for people.
            note: told who is set aside, and why.
        """
        self.ray, self.payloads, self.names, self.note = ray, payloads, names, note
        self.work = ray.put(work)
        self.hired: dict[str, _Hired] = {}
        self.calls: dict[Any, _Call] = {}
        self.sent: dict[tuple[str, int], Any] = {}
        self.known: set[str] = set()
        self.alive: set[str] = set()
        self.aside: dict[str, str] = {}
        self.failures: dict[int, list[str]] = {}
        self.versions = versions_here()
        self.looked_s = float("-inf")
        self.done_by: dict[str, int] = {}

    @property
    def working(self) -> int:
        """Workers that are at work or about to be."""
        return sum(one.actor is not None for one in self.hired.values())

    def run(self, costs: Sequence[float], keep: Result) -> Summary:
        """Do all tasks.

        Args:
            costs: of each, for the policy.
            keep: told each result that counts, once.

        Raises:
            NobodyLeft: everybody was set aside.
            TaskFailed: a task that failed twice, or ended three workers.
            WorkRefused: the work is wrong.
        """
        self.policy = Scheduler(costs)
        try:
            while not self.policy.is_done:
                self._look()
                self._send(self.policy.grants(time.monotonic()))
                ready, _ = self.ray.wait(list(self.calls), num_returns=1, timeout=_TICK_S) if self.calls else ([], [])
                if not self.calls:
                    time.sleep(_TICK_S)
                if ready and len(self.calls) > 1:
                    ready, _ = self.ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)
                for ref in ready:
                    self._hear(ref, keep)
        finally:
            for one in self.hired.values():
                self._end(one)
        return Summary(dict(self.done_by), dict(self.aside), self.policy.counts)

    # ---- who is there

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self.looked_s >= _LOOK_S or not (self.calls or self.policy.workers):
            self.looked_s = now_s
            nodes = [node for node in self.ray.nodes() if node.get("Alive")]
            self.alive = {node["NodeID"] for node in nodes}
            for node in nodes:
                if node["NodeID"] not in self.known:
                    self.known.add(node["NodeID"])
                    self._greet(node)
            for one in list(self.hired.values()):
                if one.actor is not None and one.seat.node not in self.alive:
                    self._gone(one, "its node is gone")
        for ref, call in list(self.calls.items()):
            if call.kind in ("greeting", "hello") and now_s - self.hired[call.name].since_s > HELLO_S:
                del self.calls[ref]
                self._set_aside(self.hired[call.name], f"no process was started there within {HELLO_S:.0f} s: its processors are in use")
        if not any(one.actor is not None for one in self.hired.values()) and not self.calls:
            raise NobodyLeft(self.aside, len(self.payloads) - len(self.policy.done))

    def _greet(self, node: Mapping[str, Any]) -> None:
        for seat in seats_of(node):
            self.hired[seat.name] = one = _Hired(seat, since_s=time.monotonic())
            asking = self.ray.remote(question()).options(num_cpus=0, max_retries=0, scheduling_strategy=at_node(seat.node))
            self.calls[asking.remote()] = _Call("greeting", seat.name, one.actor)

    def _hire(self, one: _Hired) -> None:
        options = {
            "num_cpus": one.seat.cores,
            "num_gpus": one.seat.accelerators,
            "max_restarts": 0,
            "scheduling_strategy": at_node(one.seat.node),
        }
        one.actor, one.since_s = self.ray.remote(Worker).options(**options).remote(one.seat), time.monotonic()
        self.calls[one.actor.hello.remote()] = _Call("hello", one.seat.name, one.actor)

    # ---- what is sent and heard

    def _send(self, granted: Sequence[Grant]) -> None:
        for grant in granted:
            one = self.hired[grant.worker]
            ref = one.actor.do.remote(self.payloads[grant.task])
            self.calls[ref] = _Call("task", grant.worker, one.actor, grant.task)
            self.sent[grant.worker, grant.task] = ref

    def _hear(self, ref: Any, keep: Result) -> None:
        call = self.calls.pop(ref, None)
        if call is None:
            return
        one = self.hired[call.name]
        self.sent.pop((call.name, call.task), None)
        if call.actor is not one.actor:
            return  # of a process that was given up before
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.TaskCancelledError:
            return
        except self.ray.exceptions.RayError as error:
            if call.kind == "greeting":  # its versions are not known: nothing may be done there
                self._set_aside(one, f"it did not say which versions it has ({_words(error)})")
            else:
                self._gone(one, _words(error))
            return
        if call.kind == "greeting":
            unlike = difference(self.versions, answer)
            self._set_aside(one, unlike) if unlike else self._hire(one)
        elif call.kind == "hello":
            self.calls[one.actor.open.remote(self.work)] = _Call("open", call.name, one.actor)
        else:
            self._answered(one, call, answer, keep)

    def _answered(self, one: _Hired, call: _Call, answer: Answer, keep: Result) -> None:
        now_s = time.monotonic()
        if answer.kind == REFUSED:
            raise WorkRefused(answer.words)
        if answer.kind in (ASIDE, NODE_ASIDE):
            self._set_aside(one, answer.words, answer.kind == NODE_ASIDE)
        elif answer.kind == FAULT:
            self._fault(one, call.task, answer.words)
        elif call.kind == "open":
            self.policy.join(one.seat.name, now_s, answer.value)
        elif answer.kind == DONE:
            one.faults = 0
            result = self.policy.finished(one.seat.name, call.task, now_s, answer.took_s)
            if result.counts:
                one.tasks += 1
                self.done_by[one.seat.name] = one.tasks
                keep(call.task, answer.value)
            for back in result.withdrawn:
                ref = self.sent.pop((back.worker, back.task), None)
                if ref is not None:
                    self.ray.cancel(ref)

    # ---- what goes wrong

    def _fault(self, one: _Hired, task: int, words: str) -> None:
        one.faults += 1
        if task >= 0:
            said = self.failures.setdefault(task, [])
            said.append(f"{words} (at {one.seat.name})")
            if len(said) >= _MOST_FAULTS:
                self.policy.leave(one.seat.name, time.monotonic())
                raise TaskFailed(self.names(task), f"it failed {len(said)} times: {', then '.join(said)}")
        if one.faults >= _MOST_FAULTS:
            self._set_aside(one, words)
        else:
            self._replace(one, words)

    def _gone(self, one: _Hired, words: str) -> None:
        one.ends += 1
        for task in self._leave(one):
            if self.policy.losses(task) >= _MOST_LOSSES:
                raise TaskFailed(self.names(task), f"{_MOST_LOSSES} workers ended while they computed it, the last one with: {words}")
        self.alive = {node["NodeID"] for node in self.ray.nodes() if node.get("Alive")}
        if one.seat.node not in self.alive:
            self._set_aside(one, "its node is gone")
        elif one.ends >= _MOST_ENDS:
            self._set_aside(one, f"its process ended {one.ends} times, the last time with: {words}")
        else:
            self.note(f"{one.seat.name}: its process ended ({words}); another one takes its place")
            self._hire(one)

    def _replace(self, one: _Hired, words: str) -> None:
        self.note(f"{one.seat.name}: {words}; another process takes its place")
        self._leave(one)
        self._hire(one)

    def _set_aside(self, one: _Hired, reason: str, whole_node: bool = False) -> None:
        for other in self.hired.values() if whole_node else (one,):
            if other.seat.node == one.seat.node and other.seat.name not in self.aside:
                self.aside[other.seat.name] = reason
                self.note(f"{other.seat.name} is set aside: {reason}")
                self._leave(other)

    def _leave(self, one: _Hired) -> tuple[int, ...]:
        back = self.policy.leave(one.seat.name, time.monotonic())
        self._end(one)
        return back

    def _end(self, one: _Hired) -> None:
        if one.actor is not None:
            self.ray.kill(one.actor)
            for ref in [ref for ref, call in self.calls.items() if call.actor is one.actor]:
                call = self.calls.pop(ref)
                self.sent.pop((call.name, call.task), None)
            one.actor = None


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
