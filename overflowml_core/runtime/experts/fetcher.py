"""Carries out fetches of experts in threads of its own, the urgent ones first. Knows nothing of what it fetches."""

from __future__ import annotations

import heapq
import threading
import weakref
from collections.abc import Callable

from overflowml_core.runtime.jobs import Latch

NOW, SOON, SOMETIME = 0, 1, 2
"""Urgencies: somebody waits for it; it is expected to be asked for; there is room for it."""


class Job:
    """Something to be done by another thread."""

    __slots__ = ("_done", "_lock", "_taken", "_work", "error", "urgency")

    def __init__(self, work: Callable[[], None], urgency: int) -> None:
        self.urgency = urgency
        self.error: BaseException | None = None
        self._work: Callable[[], None] | None = work
        self._done = Latch()
        self._lock = threading.Lock()
        self._taken = False

    @property
    def is_done(self) -> bool:
        """Whether it was carried out, with or without an error."""
        return self._done.is_open

    def wait(self) -> None:
        """Wait until it was carried out."""
        self._done.wait()

    def carry_out(self) -> None:
        """Do it in the calling thread, unless another one does or did."""
        with self._lock:
            if self._taken:
                return
            self._taken = True
        try:
            if self._work is not None:
                self._work()
        except BaseException as error:  # noqa: BLE001 -- handed to whoever waits for it, in its own thread
            self.error = error
        finally:
            self._work = None  # which may hold memory
            self._done.open()

    def give_up(self) -> bool:
        """Take it out of everybody's hands, where nobody has begun with it; False where it is too late for that."""
        with self._lock:
            if self._taken:
                return False
            self._taken = True
        self._work = None
        self._done.open()
        return True


class _Queue:
    """What the threads have in common; they hold nothing else, so that whoever asks them may be dropped."""

    def __init__(self) -> None:
        # Taken through the lock itself: see note [interrupts] in jobs.py.
        self.lock = threading.RLock()
        self.condition = threading.Condition(self.lock)
        self.waiting: list[tuple[int, int, Job]] = []
        self.count = 0
        self.is_closed = False

    def put(self, job: Job) -> None:
        with self.lock:
            self.count += 1
            heapq.heappush(self.waiting, (job.urgency, self.count, job))
            self.condition.notify()

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
            left, self.waiting = self.waiting, []
            self.condition.notify_all()
        for _, _, job in left:
            job.give_up()


def _work(queue: _Queue) -> None:
    while True:
        with queue.condition:
            while not queue.waiting and not queue.is_closed:
                queue.condition.wait()
            if queue.is_closed:
                return
            job = heapq.heappop(queue.waiting)[2]
        job.carry_out()
        del job


class Fetcher:
    """A few threads that carry out jobs."""

    def __init__(self, threads: int) -> None:
        """Start the threads; they end with :meth:`close`, or when this is dropped."""
        self._queue = _Queue()
        self._threads = [
            threading.Thread(target=_work, args=(self._queue,), name=f"overflowml-experts-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, self._queue.close)

    def submit(self, work: Callable[[], None], urgency: int) -> Job:
        """Have something done."""
        job = Job(work, urgency)
        self._queue.put(job)
        return job

    def hurry(self, job: Job, urgency: int) -> None:
        """Have a job done before others, if nobody has begun with it."""
        if urgency < job.urgency and not job.is_done:
            job.urgency = urgency
            self._queue.put(job)

    def close(self) -> None:
        """End the threads; what they are at is carried out, the rest is given up."""
        self._finalizer()
        for thread in self._threads:
            thread.join()
