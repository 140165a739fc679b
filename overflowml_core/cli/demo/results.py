"""What the runs found and whether it is good: frozen values, the verdict, and their JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from overflowml_core.cli.demo.sampler import Sample
from overflowml_core.units import format_bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process measured.

    Attributes:
        device: torch's name of the device that computed.
        load_s, run_s: seconds of loading and of running, without imports.
        device_peak_bytes: most bytes of the compute tier: of the accelerator's allocator above its baseline, or of the engine's
            arenas on a CPU. None in a plain run on a CPU, where no allocator counts them.
        digest: names the result to the last bit.
        output: the result for people.
        samples: memory over time, as growth above the baseline.
        predicted_peak_bytes: what the plan said; None in a plain run.
        plan_fingerprint: of the plan; None in a plain run.
        strategy: of the plan; None in a plain run.
    """

    device: str
    load_s: float
    run_s: float
    device_peak_bytes: int | None
    digest: str
    output: str
    samples: tuple[Sample, ...]
    predicted_peak_bytes: int | None = None
    plan_fingerprint: str | None = None
    strategy: str | None = None

    @property
    def seconds(self) -> float:
        """Loading and running together."""
        return self.load_s + self.run_s

    @property
    def anonymous_growth_bytes(self) -> int:
        """The most by which the process's own memory grew."""
        return max((s.anonymous_bytes for s in self.samples), default=0)

    @property
    def resident_growth_bytes(self) -> int:
        """The same with the mapped pages of files."""
        return max((s.anonymous_bytes + s.mapped_bytes for s in self.samples), default=0)

    def to_json(self) -> str:
        """As JSON, for the way from the child process to its parent."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """Read it back."""
        document: dict[str, Any] = json.loads(text)
        document["samples"] = tuple(Sample(**s) for s in document["samples"])
        return cls(**document)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plain run and a managed run of the same question.

    Attributes:
        name: of the case.
        title: of the case.
        weights_bytes: all tensors of the model.
        budget_bytes: what the managed run was granted.
        allowance_bytes: what its process may take beside the budget when it computes on the CPU.
        direct: the plain run.
        managed: the run under the budget.
    """

    name: str
    title: str
    weights_bytes: int
    budget_bytes: int
    allowance_bytes: int
    direct: Measured
    managed: Measured

    @property
    def identical(self) -> bool:
        """Whether both gave the same, to the last bit."""
        return self.direct.digest == self.managed.digest

    @property
    def anonymous_limit_bytes(self) -> int | None:
        """What the managed process may grow by; None on an accelerator, whose weights wait in host memory by design."""
        return self.budget_bytes + self.allowance_bytes if self.managed.device == "cpu" else None

    def failures(self) -> tuple[str, ...]:
        """What is not as it must be, each in one line; empty when all is well."""
        found = []
        if not self.identical:
            found.append(f"{self.name}: the managed run gave another result than the direct one")
        peak = self.managed.device_peak_bytes
        if peak is None or peak <= 0:
            found.append(f"{self.name}: the managed run measured no memory, so the budget is not checked")
        elif peak > self.budget_bytes:
            found.append(f"{self.name}: measured peak {format_bytes(peak)}, budget {format_bytes(self.budget_bytes)}")
        limit = self.anonymous_limit_bytes
        if limit is not None:
            if not any(s.anonymous_bytes for s in self.managed.samples):
                found.append(f"{self.name}: the managed process was not sampled, so its memory is not checked")
            # Mapped files count too: weights that are mapped and not copied are in memory all the same.
            for what, growth in (("", self.managed.anonymous_growth_bytes), (" with mapped files", self.managed.resident_growth_bytes)):
                if growth > limit:
                    found.append(f"{self.name}: the managed process{what} grew by {format_bytes(growth)}, limit {format_bytes(limit)}")
                    break
        return tuple(found)

    def document(self) -> dict[str, Any]:
        """The entry of summary.json."""
        return {
            "name": self.name,
            "weights_bytes": self.weights_bytes,
            "budget_bytes": self.budget_bytes,
            "predicted_peak_bytes": self.managed.predicted_peak_bytes,
            "measured_peak_bytes": self.managed.device_peak_bytes,
            "identical": self.identical,
            "seconds_direct": round(self.direct.seconds, 3),
            "seconds_managed": round(self.managed.seconds, 3),
            "output": self.managed.output,
            "passed": not self.failures(),
            "failures": list(self.failures()),
            "device": self.managed.device,
            "strategy": self.managed.strategy,
            "plan_fingerprint": self.managed.plan_fingerprint,
            "load_seconds_direct": round(self.direct.load_s, 3),
            "load_seconds_managed": round(self.managed.load_s, 3),
            "anonymous_growth_bytes": self.managed.anonymous_growth_bytes,
            "anonymous_limit_bytes": self.anonymous_limit_bytes,
            "anonymous_growth_bytes_direct": self.direct.anonymous_growth_bytes,
            "resident_growth_bytes": self.managed.resident_growth_bytes,
            "resident_growth_bytes_direct": self.direct.resident_growth_bytes,
        }


def write_summary(path: Path, comparisons: Iterable[Comparison], broken: Iterable[tuple[str, str]] = ()) -> None:
    """Write summary.json.

    Args:
        path: of the file.
        comparisons: the runs that came to their end.
        broken: (name, message) of those that did not.
    """
    runs = [c.document() for c in comparisons] + [{"name": name, "passed": False, "error": message} for name, message in broken]
    path.write_text(json.dumps({"runs": runs}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
