"""Threads that do jobs end with their owner, wherever an interrupt fell."""

from __future__ import annotations

import gc
import threading
import time

from overflowml_core.runtime.jobs import Job, Workers
from tests.runtime.build import TIMEOUT_S
from tests.runtime.interrupts import Interrupter

NAME = "overflowml-test-jobs"


def _all_end() -> None:
    deadline = time.monotonic() + TIMEOUT_S
    # One that an interrupt kept from being started is listed for ever, and is not alive.
    while any(thread.name.startswith(NAME) and thread.is_alive() for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.0005)


def _is_interrupt(error: BaseException | None) -> bool:
    """Python's own ``Thread.start`` waits for a condition, and may say that its lock is not taken instead."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt))


def test_threads_end_when_nobody_holds_what_started_them() -> None:
    workers = Workers(3, NAME)
    job = Job(lambda: None)
    workers.submit(job)
    job.wait()
    del workers
    gc.collect()
    _all_end()


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
        _all_end()
        if not interrupter.has_failed:
            break
    assert k > 3


def test_threads_that_an_interrupt_kept_from_their_owner_end() -> None:
    k = 0
    while True:
        k += 1
        interrupter = Interrupter(k)
        failed = _started(interrupter)
        assert failed is None or _is_interrupt(failed)
        del failed  # whose frames hold what was started
        gc.collect()
        _all_end()
        if not interrupter.has_failed:
            break
    assert k > 10


def _started(interrupter: Interrupter) -> BaseException | None:
    try:
        with interrupter.at_work():
            workers = Workers(2, NAME)
    except BaseException as error:  # noqa: BLE001 -- looked at by the test
        return error
    workers.close()
    return None
