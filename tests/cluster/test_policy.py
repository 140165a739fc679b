"""Who is granted which task: each once, nothing to the slow near the end, lost work again and once, whatever happens in whatever order."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_ray.policy import Grant, Scheduler


class Play:
    """Workers of fixed speeds that compute what they are granted, on a clock. Some end in the middle."""

    def __init__(self, unit_s: list[float], costs: list[float], ends_s: dict[int, float] | None = None, **how: bool) -> None:
        self.policy, self.unit_s, self.costs = Scheduler(costs, **how), unit_s, costs
        self.ends_s, self.now_s = ends_s or {}, 0.0
        self.counted: list[int] = []
        self.begun: list[tuple[float, str, int]] = []
        self.free_s = [0.0] * len(unit_s)
        self.events: list[tuple[float, int, str, int]] = []
        self.back: set[tuple[str, int]] = set()
        for index in range(len(unit_s)):
            self.policy.join(str(index), 0.0)
        for index, end_s in self.ends_s.items():
            heapq.heappush(self.events, (end_s, index, "ends", -1))

    def run(self) -> float:
        """Seconds until all is done."""
        self._send()
        steps = 0
        while not self.policy.is_done:
            steps += 1
            assert steps < 50 * len(self.costs) + 500, "nobody does what is left"
            if not self.events:
                self.now_s += 1.0  # what a driver does as well: it asks now and then
                self._send()
                continue
            self.now_s, index, kind, task = heapq.heappop(self.events)
            name = str(index)
            if kind == "ends":
                self.policy.leave(name, self.now_s)
            elif self.now_s < self.ends_s.get(index, float("inf")) and (name, task) not in self.back:
                result = self.policy.finished(name, task, self.now_s)
                self.counted += [task] if result.counts else []
                self.back |= {(one.worker, one.task) for one in result.withdrawn}
                for one in result.withdrawn:
                    self.free_s[int(one.worker)] -= self.unit_s[int(one.worker)] * self.costs[one.task]
            self._send()
        return self.now_s

    def _send(self) -> None:
        for grant in self.policy.grants(self.now_s):
            index = int(grant.worker)
            self.back.discard((grant.worker, grant.task))
            begins_s = max(self.now_s, self.free_s[index])
            self.begun.append((begins_s, grant.worker, grant.task))
            self.free_s[index] = begins_s + self.unit_s[index] * self.costs[grant.task]
            heapq.heappush(self.events, (self.free_s[index], index, "done", grant.task))


speeds = st.lists(st.floats(0.1, 10), min_size=1, max_size=6)
sizes = st.lists(st.sampled_from([1.0, 1.0, 2.0, 5.0]), min_size=1, max_size=30)


@given(speeds, sizes, st.lists(st.floats(0, 60), max_size=5))
def test_every_task_is_counted_once_as_long_as_one_worker_is_left(unit_s, costs, ends_s):
    play = Play(unit_s, costs, dict(list(enumerate(ends_s))[: len(unit_s) - 1]))
    play.run()
    assert sorted(play.counted) == list(range(len(costs)))


@given(speeds, sizes)
def test_the_same_events_give_the_same_grants(unit_s, costs):
    first, second = Play(unit_s, costs), Play(unit_s, costs)
    assert (first.run(), first.begun) == (second.run(), second.begun)


@given(st.lists(st.floats(1, 10), min_size=2, max_size=8), st.integers(20, 60))
def test_the_makespan_is_near_the_bound(unit_s, count):
    """Whole tasks cannot be cut: the bound and one task of a worker that is fast enough to matter, beside what is learned at the start."""
    bound_s = count / sum(1 / one for one in unit_s)
    assert Play(unit_s, [1.0] * count).run() <= bound_s + 1.5 * max(unit_s)


def test_workers_do_as_much_as_they_are_fast():
    play = Play([1.0, 4.0], [1.0] * 50)
    play.run()
    assert 38 <= sum(worker == "0" for _, worker, _ in play.begun) <= 42


def test_near_the_end_a_slow_worker_is_granted_nothing_that_a_fast_one_does_sooner():
    policy = Scheduler([1.0] * 5)
    policy.join("fast", 0.0, unit_s=1.0)
    policy.join("slow", 0.0, unit_s=10.0)
    assert {one.worker for one in policy.grants(0.0)} == {"fast"}


def test_where_there_is_enough_the_slow_work_as_well():
    policy = Scheduler([1.0] * 30)
    policy.join("fast", 0.0, unit_s=1.0)
    policy.join("slow", 0.0, unit_s=10.0)
    assert {one.worker for one in policy.grants(0.0)} == {"fast", "slow"}


def test_a_slow_worker_gets_what_a_fast_one_that_hangs_does_not_do():
    policy = Scheduler([1.0] * 3, ahead=0)
    policy.join("fast", 0.0, unit_s=1.0)
    policy.join("slow", 0.0, unit_s=10.0)
    assert [one.worker for one in policy.grants(0.0)] == ["fast"]
    assert policy.grants(5.0) == []
    assert [one.worker for one in policy.grants(100.0)] == ["slow"]


def test_the_dearest_go_first_and_to_whom_they_do_not_delay():
    policy = Scheduler([1.0, 8.0, 1.0, 1.0], ahead=0)
    policy.join("fast", 0.0, unit_s=1.0)
    policy.join("slow", 0.0, unit_s=3.0)
    assert policy.grants(0.0) == [Grant("fast", 1), Grant("slow", 0)]


def test_what_a_lost_worker_held_waits_again_in_front_and_once():
    policy = Scheduler([1.0] * 6)
    policy.join("a", 0.0, unit_s=1.0)
    policy.join("b", 0.0, unit_s=1.0)
    held = [one.task for one in policy.grants(0.0) if one.worker == "a"]
    assert len(held) == 2
    assert list(policy.leave("a", 1.0)) == held
    assert policy.leave("a", 1.0) == ()
    assert policy.counts.redone == 2
    assert [policy.losses(task) for task in held] == [1, 0], "only the one that it computed may be to blame"
    policy.join("c", 1.0, unit_s=1.0)
    assert [one.task for one in policy.grants(1.0) if one.worker == "c"] == held


def test_a_result_of_a_worker_that_was_believed_gone_counts_and_is_not_done_again():
    policy = Scheduler([1.0, 1.0])
    policy.join("a", 0.0, unit_s=1.0)
    policy.grants(0.0)
    policy.leave("a", 1.0)
    assert policy.finished("a", 0, 2.0).counts
    policy.join("b", 2.0, unit_s=1.0)
    assert [one.task for one in policy.grants(2.0)] == [1]
    assert policy.finished("b", 1, 3.0).counts
    assert policy.is_done


def test_a_late_task_gets_a_copy_and_the_first_result_counts():
    policy = Scheduler([1.0, 1.0])
    policy.join("a", 0.0, unit_s=1.0)
    policy.join("b", 0.0, unit_s=1.0)
    first, second = policy.grants(0.0)
    assert policy.finished(second.worker, second.task, 1.0).counts
    assert policy.grants(1.05) == []
    assert policy.grants(9.0) == [Grant(second.worker, first.task, is_copy=True)]
    assert policy.grants(20.0) == [], "two copies at most"
    assert policy.finished(second.worker, first.task, 10.0).counts
    assert not policy.finished(first.worker, first.task, 11.0).counts
    assert policy.is_done
    assert (policy.counts.copies, policy.counts.superfluous) == (1, 1)


def test_a_worker_that_leaves_a_copy_behind_costs_nothing():
    policy = Scheduler([1.0, 1.0])
    policy.join("a", 0.0, unit_s=1.0)
    policy.join("b", 0.0, unit_s=1.0)
    first, second = policy.grants(0.0)
    policy.finished(second.worker, second.task, 1.0)
    assert len(policy.grants(9.0)) == 1
    assert policy.leave(first.worker, 9.5) == ()
    assert policy.held(second.worker) == (first.task,)


def test_a_copy_that_waits_behind_another_task_is_taken_back_when_the_other_is_done():
    policy = Scheduler([1.0] * 3)
    policy.join("slow", 0.0, unit_s=10.0)
    assert [one.task for one in policy.grants(0.0)] == [0, 1]
    policy.join("fast", 0.0, unit_s=1.0)
    assert policy.grants(0.0) == [Grant("fast", 2)]
    policy.finished("fast", 2, 1.0)
    assert policy.grants(1.0) == [Grant("fast", 1, is_copy=True)]
    assert policy.finished("fast", 1, 2.0).withdrawn == (Grant("slow", 1),)
    assert policy.held("slow") == (0,)


def test_what_a_worker_could_not_do_waits_again():
    policy = Scheduler([1.0])
    policy.join("a", 0.0)
    policy.grants(0.0)
    assert policy.failed("a", 0, 1.0)
    assert not policy.failed("a", 0, 1.0)
    policy.leave("a", 1.0)
    policy.join("b", 1.0)
    assert policy.grants(1.0) == [Grant("b", 0)]


def test_a_worker_of_unknown_speed_is_granted_one_task_until_it_has_done_it():
    policy = Scheduler([1.0] * 9)
    policy.join("a", 0.0)
    assert len(policy.grants(0.0)) == 1
    policy.finished("a", 0, 2.0)
    assert len(policy.grants(2.0)) == 2


def test_messages_are_two_for_a_task():
    play = Play([1.0, 2.0, 3.0], [1.0] * 100)
    play.run()
    assert 200 <= play.policy.counts.messages <= 206


@pytest.mark.parametrize("cost", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cost_that_is_none_is_refused(cost):
    with pytest.raises(ValueError, match="above zero"):
        Scheduler([1.0, cost])


def test_two_workers_of_one_name_are_refused():
    policy = Scheduler([1.0])
    policy.join("a", 0.0)
    with pytest.raises(ValueError, match="there already"):
        policy.join("a", 0.0)
