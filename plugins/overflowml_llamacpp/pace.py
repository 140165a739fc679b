"""How long a token takes: the bytes that it reads, over the rates of the memories that they lie in. Knows no flags.

Decoding one sequence waits for memory: each weight in use is read once, with the cache. What the CPU and the device read comes one after
the other, layer by layer, so the times add up: ``device bytes / device rate + RAM bytes / (share * RAM rate)``. Handing a hidden state from
one to the other, and starting kernels, are not counted.
"""

from __future__ import annotations

from overflowml_core.machine import Rates
from overflowml_core.planner.cost import Costs
from overflowml_core.work import Work
from overflowml_llamacpp.memory import Memory
from overflowml_llamacpp.setting import Setting

CPU_SHARE = 0.65
"""Of the memory rate of a CPU that kernels of quantized weights reach: 0.61 to 0.75 of STREAM (KTransformers, experts)."""

FORMULA = f"bytes on the device / its memory rate + bytes in RAM / ({CPU_SHARE} x its rate)"


def token_seconds(memory: Memory, setting: Setting) -> float | None:
    """Seconds of one token of one sequence, its context half full.

    Args:
        memory: what it reads of which memory.
        setting: the rates.

    Returns:
        None where a rate that it needs is not known.
    """
    device_s = _seconds(memory.device_read_bytes, setting.device_rates)
    host_s = _seconds(memory.host_read_bytes, setting.cpu_rates)
    disk_s = _disk_seconds(memory, setting)
    if device_s is None or host_s is None or disk_s is None:
        return None
    return device_s + host_s / CPU_SHARE + disk_s


def disk_share(memory: Memory, setting: Setting) -> float:
    """Share of the weights in RAM that does not fit there, so that they are read from the disk again for each token."""
    left = setting.host_bytes - memory.host_cache_bytes
    if memory.host_weight_bytes <= left or not memory.host_weight_bytes:
        return 0.0
    return 1 - max(left, 0) / memory.host_weight_bytes


def _seconds(nbytes: int, rates: Rates | None) -> float | None:
    if not nbytes:
        return 0.0
    if rates is None:
        return None
    spent = Costs(rates).seconds((Work("memory", "F16", 0, nbytes, calls=0),))
    return None if spent is None else spent.total_s


def _disk_seconds(memory: Memory, setting: Setting) -> float | None:
    nbytes = memory.host_read_bytes * disk_share(memory, setting)
    if not nbytes:
        return 0.0
    rate = setting.cpu_rates.disk_bytes_per_s
    return nbytes / rate if rate > 0 else None
