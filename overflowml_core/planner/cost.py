"""What computing costs: seconds of operations on the rates of a device. Knows nothing of where weights are or when they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overflowml_core.machine import Rates
from overflowml_core.work import Work


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a format does to the weights of a block's matrix products.

    Attributes:
        shrink: bytes of a weight over those that it has as stored; 1 where it stays as it is.
        decode_bytes_per_s: bytes of decoded weights a second where they are decoded before the product; 0 where the kernel decodes on the
            way.
    """

    shrink: float = 1.0
    decode_bytes_per_s: float = 0.0


AS_IT_IS = Conversion()


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds that computing takes, and how many of them wait for the device's own memory and not for its arithmetic."""

    total_s: float
    memory_s: float


NOTHING = Spent(0.0, 0.0)


class Costs:
    """Seconds of works on one device, each distinct work reckoned once however many blocks have it.

    The model is a roofline: operations of a kind take ``calls * launch_s + max(flop / flop_per_s, traffic_bytes / memory_bytes_per_s)``,
    for arithmetic and memory work at the same time and the slower one is waited for (Williams, Waterman, Patterson: Roofline, CACM 2009).
    An operation that was measured on the machine takes what was measured. Operations of a block follow one another.

    Under a format the traffic of the weights of matrix products shrinks by the ratio of bits; where weights are decoded before the
    product, decoding them is added. A measured operation under a format is scaled by the ratio of its two rooflines.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self._measured = dict(rates.op_seconds)
        self._by_identity: dict[tuple[int, Conversion], Spent | None] = {}
        self._by_value: dict[tuple[tuple[Work, ...], Conversion], Spent | None] = {}
        self._kept: list[Sequence[Work]] = []

    def seconds(self, works: tuple[Work, ...], conversion: Conversion = AS_IT_IS) -> Spent | None:
        """Seconds of works one after the other.

        Returns:
            None where a rate that they need is not known.
        """
        key = (id(works), conversion)
        if key not in self._by_identity:
            self._kept.append(works)  # so that no other tuple takes its identity
            value = (works, conversion)
            if value not in self._by_value:
                self._by_value[value] = self._reckon(works, conversion)
            self._by_identity[key] = self._by_value[value]
        return self._by_identity[key]

    def _reckon(self, works: tuple[Work, ...], conversion: Conversion) -> Spent | None:
        total_s = memory_s = 0.0
        for work in works:
            spent = self._work(work, conversion)
            if spent is None:
                return None
            total_s += spent.total_s
            memory_s += spent.memory_s
        return Spent(total_s, memory_s)

    def _work(self, work: Work, conversion: Conversion) -> Spent | None:
        weight_bytes = min(work.weight_bytes, work.traffic_bytes) if work.kind == "matmul" else 0
        converted = bool(weight_bytes) and conversion != AS_IT_IS
        roof = self._roofline(work, work.traffic_bytes)
        measured_s = self._measured.get(work.signature) if work.signature else None
        if measured_s is not None:
            base_s = measured_s * work.calls
            roof = Spent(base_s, 0.0) if roof is None else _scaled(roof, base_s)
        if roof is None or not converted:
            return roof
        lighter = self._roofline(work, round(work.traffic_bytes - weight_bytes * (1 - conversion.shrink)))
        if measured_s is not None and lighter is not None:
            full = self._roofline(work, work.traffic_bytes)
            lighter = _scaled(lighter, roof.total_s * lighter.total_s / full.total_s) if full is not None and full.total_s else roof
        spent = roof if lighter is None else lighter
        decode_s = weight_bytes / conversion.decode_bytes_per_s if conversion.decode_bytes_per_s > 0 else 0.0
        return Spent(spent.total_s + decode_s, spent.memory_s + decode_s)

    def _roofline(self, work: Work, traffic_bytes: int) -> Spent | None:
        flop_s = memory_s = 0.0
        if work.flop and work.kind != "memory":
            rate = self.rates.flop_per_s(work.kind, work.dtype)
            if rate <= 0:
                return None
            flop_s = work.flop / rate
        if traffic_bytes > 0:
            if self.rates.memory_bytes_per_s <= 0:
                return None
            memory_s = traffic_bytes / self.rates.memory_bytes_per_s
        launch_s = work.calls * self.rates.launch_s
        return Spent(launch_s + max(flop_s, memory_s), memory_s if memory_s > flop_s else 0.0)


def _scaled(spent: Spent, total_s: float) -> Spent:
    return Spent(total_s, spent.memory_s * total_s / spent.total_s if spent.total_s else 0.0)
