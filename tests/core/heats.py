"""Reports of experts to save and draw, and as much of an engine as counts them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from overflowml_core.expert_report import BankReport, ExpertReport
from overflowml_core.heat import Run

FINGERPRINT = "0123456789abcdef"


def bank(tokens: tuple[int, ...], block: str = "layers.0", per_token: int = 2, cached: tuple[int, ...] = ()) -> BankReport:
    asked = sum(1 for count in tokens if count)
    return BankReport("model", block, per_token, 1000, asked, asked // 2, 500 * asked, tokens, cached)


def report(*banks: BankReport, stall_s: float = 0.5) -> ExpertReport:
    tokens = sum(banks[0].tokens) // banks[0].per_token if banks else 0
    return ExpertReport(banks, tokens, tokens, 4, 1024, stall_s, 10, 5, 0, 64.0)


def run(counted: ExpertReport, key: str = "a", source: str = "/models/moe", ended_s: float = 1_700_000_000.0) -> Run:
    return Run(key, source, "cpu", ended_s, 2.0, counted)


class Engine:
    """As much of an engine as the recorder asks."""

    def __init__(self) -> None:
        self.network = SimpleNamespace(fingerprint=FINGERPRINT, class_name="Moe")
        self.plan = SimpleNamespace(device="cpu")
        self.counted = report(bank((0, 0, 0, 0)))
        self._undo: list[Callable[[], None]] = []

    def on_detach(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def detach(self) -> bool:
        while self._undo:
            self._undo.pop()()
        return True

    def expert_report(self):
        return self.counted
