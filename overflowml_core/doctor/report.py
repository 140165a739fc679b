"""What an examination says: facts as labelled lines, and checks with the command that helps. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["PASS", "WARN", "FAIL"]
"""PASS: as it should be. WARN: it works, with less than there could be. FAIL: something that the user counts on does not work."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer.

    Attributes:
        name: of the question, for scripts ("torch-driver").
        level: the answer.
        text: the answer in one line, with its values.
        fix: a command, or an action where no command does it; empty for PASS.
    """

    name: str
    level: Level
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """An examination.

    Attributes:
        environment, hardware: (label, value) in the order in which they are shown.
        checks: in the order in which they are shown.
    """

    environment: tuple[tuple[str, str], ...]
    hardware: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Nothing failed; warnings do not count."""
        return all(check.level != "FAIL" for check in self.checks)

    def document(self) -> dict[str, object]:
        """The report as plain values, for JSON."""
        checks = [{"name": c.name, "level": c.level, "text": c.text, "fix": c.fix} for c in self.checks]
        return {"ok": self.ok, "environment": dict(self.environment), "hardware": dict(self.hardware), "checks": checks}
