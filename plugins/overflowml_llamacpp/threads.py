"""How many threads llama.cpp should compute with: one for each core, not for each of its threads. Knows no model."""

from __future__ import annotations

import psutil


def physical_cores(core_count: int) -> int:
    """Cores that this process may use, hyper-threads not counted: two of one core share what quantized products need.

    Args:
        core_count: of the operating system's, as this process may use them.
    """
    found = psutil.cpu_count(logical=False)
    return max(1, min(found or core_count, core_count))
