"""The form in which every benchmark reports: figures with units, the machine, the versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Figures of one benchmark, in the order in which they were measured."""

    benchmark: str
    figures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str) -> None:
        """Note a figure and print it."""
        self.figures.append({"name": name, "value": value, "unit": unit})
        print(f"{name:32} {value:>16.6g} {unit}", flush=True)

    def document(self) -> dict[str, Any]:
        """The report as JSON values."""
        import overflowml
        from overflowml_core.inspect.machine_file import machine_document

        machine = machine_document(overflowml.detect())
        for rates in (machine["rates"], machine["cpu_rates"] or {}):
            rates.pop("op_seconds", None)  # thousands of lines about the models of this run
        return {
            "benchmark": self.benchmark,
            "machine": {"platform": platform.platform(), **machine},
            "versions": {name: _version(name) for name in ("overflowml", "torch", "diffusers", "transformers", "accelerate")},
            "figures": self.figures,
        }

    def write(self, path: Path | None) -> None:
        """Write the report, where a path was asked for."""
        if path is not None:
            path.write_text(json.dumps(self.document(), indent=2) + "\n", encoding="utf-8")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
