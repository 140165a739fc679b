"""What can keep the demo from running, as errors with a way out."""

from __future__ import annotations

from overflowml_core.errors import OverflowmlError


class DemoUnavailable(OverflowmlError):
    """Something that the demo needs is not there: a package, a name, room on the disk."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"demo: {problem}; {remedy}")


class ChildFailed(OverflowmlError):
    """A measured run that ended without a result.

    Attributes:
        what: which run ("smollm2, managed").
        status: exit status; negative is the signal that ended it.
        stderr_tail: the last lines that it wrote.
    """

    def __init__(self, what: str, status: int | None, stderr_tail: str) -> None:
        self.what, self.status, self.stderr_tail = what, status, stderr_tail
        if status is None:
            how = "took too long and was ended"
        elif status < 0:
            how = f"was ended by signal {-status}" + (" (the system ran out of memory?)" if status == -9 else "")
        else:
            how = f"ended with status {status}"
        super().__init__(f"demo: the run '{what}' {how}; its last lines:\n{stderr_tail.strip() or '(none)'}")
