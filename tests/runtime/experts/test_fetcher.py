"""Fetches in threads: the urgent ones first, errors kept for who waits, nothing left behind."""

from __future__ import annotations

import gc
import threading
import weakref

from overflowml_core.runtime.experts.fetcher import NOW, SOMETIME, SOON, Fetcher
from tests.runtime.build import TIMEOUT_S


class Gate:
    """One thread that is held until it is let go, so that what is asked for meanwhile waits."""

    def __init__(self) -> None:
        self.fetcher = Fetcher(1)
        self._open = threading.Event()
        begun = threading.Event()

        def hold() -> None:
            begun.set()
            self._open.wait(TIMEOUT_S)

        self.holder = self.fetcher.submit(hold, NOW)
        assert begun.wait(TIMEOUT_S)

    def release(self) -> None:
        self._open.set()


def test_the_urgent_ones_come_first_and_equals_in_order() -> None:
    gate, done = Gate(), []
    jobs = [gate.fetcher.submit(lambda n=n: done.append(n), urgency) for n, urgency in enumerate((SOMETIME, SOON, NOW, SOON, NOW))]
    gate.release()
    for job in jobs:
        job.wait()
    gate.fetcher.close()
    assert done == [2, 4, 1, 3, 0]


def test_a_job_can_be_hurried_and_is_done_once() -> None:
    gate, done = Gate(), []
    jobs = [gate.fetcher.submit(lambda n=n: done.append(n), SOMETIME) for n in range(3)]
    gate.fetcher.hurry(jobs[2], NOW)
    gate.release()
    for job in jobs:
        job.wait()
    gate.fetcher.close()
    assert done == [2, 0, 1]


def test_only_what_nobody_has_begun_can_be_given_up() -> None:
    gate, done = Gate(), []
    job = gate.fetcher.submit(lambda: done.append(0), SOON)
    assert job.give_up()
    assert job.is_done
    assert not gate.holder.give_up()
    gate.release()
    gate.fetcher.close()
    assert done == []


def test_errors_wait_for_who_asks() -> None:
    def fail() -> None:
        raise OSError("gone")

    fetcher = Fetcher(2)
    job = fetcher.submit(fail, NOW)
    job.wait()
    fetcher.close()
    assert isinstance(job.error, OSError)


def test_what_is_left_is_given_up_at_the_end() -> None:
    gate = Gate()
    job = gate.fetcher.submit(lambda: None, SOMETIME)
    threading.Timer(0.05, gate.release).start()
    gate.fetcher.close()
    assert job.is_done
    assert gate.holder.is_done


def test_a_dropped_fetcher_ends_its_threads() -> None:
    fetcher = Fetcher(2)
    threads, seen = fetcher._threads, weakref.ref(fetcher)
    del fetcher
    gc.collect()
    assert seen() is None
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads)
