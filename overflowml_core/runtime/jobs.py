"""Work that other threads carry out, in order. Knows nothing of what it is.

Note [interrupts]. ``threading``'s events, conditions and semaphores, and with them its pools, are Python: an interrupt that falls inside
one of their methods leaves its lock taken for ever. What the calling thread uses here are locks and queues alone, which are C: an
interrupt falls before or behind their methods, never inside.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable


class Latch:
    """Shut until it is opened, once."""

    __slots__ = ("_lock", "is_open")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.is_open = False

    def open(self) -> None:
        """Let those go on that wait. A second call does nothing."""
        if not self.is_open:
            self.is_open = True
            self._lock.release()

    def wait(self) -> None:
        """Wait until it is open."""
        if not self.is_open:
            with self._lock:
                return


class Job:
    """Something to be done once: by a worker, or by whoever waits for it where it never got to one.

    Attributes:
        done: open once it was done or failed.
        error: what failed; for whoever waits, in its own thread.
        is_handed_over: a worker will do it.
    """

    __slots__ = ("_is_taken", "_lock", "_work", "done", "error", "is_handed_over")

    def __init__(self, work: Callable[[], None]) -> None:
        self.done = Latch()
        self.error: BaseException | None = None
        self.is_handed_over = False
        self._work: Callable[[], None] | None = work
        self._is_taken = False
        self._lock = threading.Lock()

    def carry_out(self) -> None:
        """Do it in the calling thread, unless another one does or did."""
        is_mine = False
        try:
            with self._lock:
                is_mine, self._is_taken = not self._is_taken, True
            if is_mine and self._work is not None:
                self._work()
        except BaseException as error:
            if not is_mine:
                raise
            self.error = error
        finally:
            if is_mine:
                self._work = None  # which may hold memory
                self.done.open()

    def wait(self) -> None:
        """Wait until it was done; do it here where an interrupt, or a thread that did not start, left it to nobody."""
        if not self.is_handed_over:
            self.carry_out()
        self.done.wait()


class Workers:
    """A few threads that do jobs in the order in which they came."""

    def __init__(self, count: int, name: str) -> None:
        """Start the threads; they end with :meth:`close`, or when this is dropped.

        Raises:
            RuntimeError: the system starts no more threads.
        """
        self._jobs: queue.SimpleQueue[Job | object] = queue.SimpleQueue()
        # What tells of the end is C as well: Python drops an interrupt that falls into a finalizer, and the rest of the finalizer with it.
        owner = weakref.ref(self, self._jobs.put)
        self._threads = [threading.Thread(target=_work, args=(self._jobs, owner), name=f"{name}_{k}", daemon=True) for k in range(count)]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    def submit(self, job: Job) -> None:
        """Have a job done."""
        self._jobs.put(job)
        job.is_handed_over = True

    def close(self) -> None:
        """End the threads; what they are at is done, and what waits is left.

        A second call does nothing, and goes on where the first one was broken off.
        """
        waiting: list[object] = []
        while True:
            try:
                waiting.append(self._jobs.get_nowait())
            except queue.Empty:
                break
        self._jobs.put(None)
        for thread in self._threads:
            if thread.is_alive():  # one that an interrupt kept from saying that it started ends by itself
                thread.join()


def _work(jobs: queue.SimpleQueue[Job | object], owner: weakref.ref[Workers]) -> None:
    while True:
        job = jobs.get()
        if not isinstance(job, Job) or owner() is None:
            jobs.put(None)  # for the next thread
            return
        job.carry_out()
        del job  # which may hold memory while this waits for the next
