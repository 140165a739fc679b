"""The benchmarks are scripts that import each other by their plain names: their folder is put where they find each other."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
