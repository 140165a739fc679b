"""Threads that do jobs end with their owner, wherever an interrupt fell."""

from __future__ import annotations

import gc
import threading

from overflowml_core.runtime.jobs import Job, Workers
from tests.runtime.build import TIMEOUT_S
from tests.runtime.interrupts import Interrupter

NAME = "overflowml-test-jobs"


def _end_of(threads: list[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:
            thread.join(TIMEOUT_S)
    assert not any(thread.name.startswith(NAME) and thread.is_alive() for thread in threading.enumerate())


def test_threads_end_when_nobody_holds_what_started_them() -> None:
    workers = Workers(3, NAME)
    threads, job = workers._threads, Job(lambda: None)
    workers.submit(job)
    job.wait()
    del workers
    gc.collect()
    _end_of(threads)


def test_what_an_interrupt_broke_off_is_ended_by_the_next_try() -> None:
    k = 0
    while True:
        k += 1
        workers, interrupter = Workers(2, NAME), Interrupter(k)
        try:
            with interrupter.at_work():
                workers.close()
        except KeyboardInterrupt:
            workers.close()
        _end_of(workers._threads)
        if not interrupter.has_failed:
            break
    assert k > 3


def test_threads_that_an_interrupt_kept_from_their_owner_end() -> None:
    k = 0
    while True:
        k += 1
        workers, interrupter = None, Interrupter(k)
        try:
            with interrupter.at_work():
                workers = Workers(2, NAME)
        except (KeyboardInterrupt, RuntimeError) as error:
            # Python's own Thread.start waits for a condition, and may say that a lock is not taken instead.
            assert isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        if workers is not None:
            workers.close()
        del workers
        gc.collect()
        _end_of([thread for thread in threading.enumerate() if thread.name.startswith(NAME)])
        if not interrupter.has_failed:
            break
    assert k > 10
