"""Knows accelerators by name: what their vendors print, and what of it a machine that was never measured may be planned with.

The numbers lie in ``overflowml_core/data/accelerators.json``, each with its source. Knows nothing of the machine it runs on.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from overflowml_core.errors import OverflowmlError
from overflowml_core.inspect.driver import unified_bytes
from overflowml_core.machine import ComputeRate, Rates

MATMUL_SHARE = {"cuda": 0.7, "rocm": 0.55, "xpu": 0.5, "mps": 0.7}
"""Share of the printed dense rate that torch's large matrix products reach. NVIDIA: 0.7 to 0.8 on boards that hold their clock (92 of 119
TFLOP/s on a GB10, by its users), 0.5 where the power limit does not let them (L4, L40S). ROCm's and XPU's libraries lie lower."""
CONV_SHARE = 0.7
ATTENTION_SHARE = 0.6
"""Rates of convolutions and of fused attention as shares of those of matrix products: flash attention of the second generation reaches
0.5 to 0.7 of the tensor peak on the hardware it was written for (its paper), less after that."""
MEMORY_SHARE = 0.85
"""Share of the printed memory rate that elementwise kernels reach: 218 of 273 GB/s on a GB10, 0.85 to 0.92 on GDDR and HBM."""
LAUNCH_S = {"cuda": 7e-6, "rocm": 1e-5, "xpu": 1e-5, "mps": 1.5e-5}
"""What an operation costs at least in eager torch: interpreter and dispatcher take 5 to 10 microseconds, command queues the rest."""

PCIE_LANE_BYTES_PER_S = {1: 0.19e9, 2: 0.38e9, 3: 0.75e9, 4: 1.5625e9, 5: 3.4375e9, 6: 6.875e9}
"""Pinned copies, per lane: 12, 25 and 55 GB/s over sixteen lanes of generations 3, 4 and 5 (measured by others: 11 to 12.3, 23.9 to 26.4,
55.6 to 56.4). Generations 1 and 2 are a quarter and a half of 3, 6 is twice 5."""
C2C_BYTES_PER_S = (411e9, 170e9)
"""NVLink-C2C to the device and back, as measured on GH200 (Megatron-LM issue 6491)."""
PAGEABLE_SHARE = 0.55
PAGEABLE_CEILING_BYTES_PER_S = 12e9
"""Copies from pageable RAM pass through the driver's own pinned buffer, so that one core's memory copy bounds them: 13 to 18 GB/s on an
RTX 4090, 9.6 on an RTX 5090 with twice the link."""

_FALLBACK_DTYPES = ("F16", "BF16")
"""A dtype that the hardware lacks is computed in F32; these two are what models come in."""
_NOISE = re.compile(r"\((?:r|tm)\)|\b(?:nvidia|geforce|amd|radeon|intel|apple|tesla|instinct|graphics|quadro|gpu|generation|card)\b")
_MEMORY = re.compile(r"(?<![0-9.])([0-9]{1,4})\s*(?:gib|gb|g)\b")
_LONGEST_NAME = 120
_REPORTED = (0.88, 1.02)
"""A driver reports a little less than the size that is sold: reserved pages, and error correction takes up to an eighth of GDDR."""


class UnknownAccelerator(OverflowmlError):
    """A name that no accelerator has, or that several have. ``near`` holds what may be meant."""

    def __init__(self, message: str, near: Sequence[str]) -> None:
        self.near = tuple(near)
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Datasheet:
    """One accelerator as its vendor prints it.

    Attributes:
        name: as its driver reports it, or close to that.
        aliases: other names; one that several share stands for the first of them with the memory asked for.
        kind, backend, capability, features, unified: as in :class:`~overflowml_core.machine.Accelerator`.
        memory_options_bytes: sizes that are sold, the usual one first.
        memory_bytes: the size that is meant.
        memory_bytes_per_s: peak rate of its memory.
        flop_per_s: (dtype, dense peak): of matrix units with F32 accumulation; "F32" of ordinary units.
        unit_count, clock_hz: SMs, compute units, Xe cores or GPU cores, and the boost clock; the rates follow from them.
        link: "PCIe 4.0 x16", "NVLink-C2C" or "unified".
        source: title of the vendor's document.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    backend: str
    memory_options_bytes: tuple[int, ...]
    memory_bytes: int
    memory_bytes_per_s: float
    unit_count: int
    clock_hz: int
    flop_per_s: tuple[tuple[str, float], ...]
    link: str
    unified: bool
    capability: str
    features: frozenset[str]
    source: str

    def peak_flop_per_s(self, dtype: str) -> float:
        """Dense peak in a dtype; 0 where the hardware lacks it."""
        return dict(self.flop_per_s).get(dtype, 0.0)

    def rates(self, disk_bytes_per_s: float, link: str = "") -> Rates:
        """What may be planned with: the printed rates times the shares of this file.

        Args:
            disk_bytes_per_s: rate of the disk, of which a datasheet knows nothing.
            link: as linked in a real machine; the datasheet's own where empty.
        """
        to_device, back = link_bytes_per_s(link or self.link) or link_bytes_per_s(self.link) or (0.0, 0.0)
        if self.unified:
            to_device = back = self.memory_bytes_per_s * MEMORY_SHARE / 2  # a copy reads and writes the same memory
        pageable = min(to_device * PAGEABLE_SHARE, PAGEABLE_CEILING_BYTES_PER_S)
        return Rates(
            h2d_bytes_per_s=to_device,
            d2h_bytes_per_s=back,
            disk_bytes_per_s=disk_bytes_per_s,
            source="datasheet",
            pageable_h2d_bytes_per_s=pageable,
            pageable_d2h_bytes_per_s=min(back, pageable),
            memory_bytes_per_s=self.memory_bytes_per_s * MEMORY_SHARE,
            compute=self._compute(),
            launch_s=LAUNCH_S[self.backend],
        )

    def _compute(self) -> tuple[ComputeRate, ...]:
        peaks = dict(self.flop_per_s)
        for dtype in _FALLBACK_DTYPES:
            peaks.setdefault(dtype, peaks["F32"])
        share = MATMUL_SHARE[self.backend]
        kinds = (("matmul", share), ("conv", share * CONV_SHARE), ("attention", share * ATTENTION_SHARE))
        return tuple(ComputeRate(kind, dtype, peak * part) for dtype, peak in peaks.items() for kind, part in kinds)


def link_bytes_per_s(link: str) -> tuple[float, float] | None:
    """Pinned copies over a link to the device and back, in bytes a second; None for what is no link ("unified", "").

    Args:
        link: "PCIe 4.0 x16" or "NVLink-C2C".
    """
    if link == "NVLink-C2C":
        return C2C_BYTES_PER_S
    match = re.fullmatch(r"PCIe ([1-6])\.0 x(\d{1,2})", link)
    if match is None or not int(match[2]):
        return None
    rate = PCIE_LANE_BYTES_PER_S[int(match[1])] * int(match[2])
    return rate, rate


@functools.lru_cache(maxsize=1)
def datasheets() -> tuple[Datasheet, ...]:
    """All accelerators that are known, grouped by generation."""
    file = importlib.resources.files("overflowml_core") / "data" / "accelerators.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    return tuple(_read(entry, document["sources"]) for entry in document["accelerators"])


def _read(entry: dict[str, Any], sources: dict[str, str]) -> Datasheet:
    return Datasheet(
        name=entry["name"],
        aliases=tuple(entry["aliases"]),
        kind=entry["kind"],
        backend=entry["backend"],
        memory_options_bytes=tuple(entry["memory_bytes"]),
        memory_bytes=entry["memory_bytes"][0],
        memory_bytes_per_s=entry["memory_bytes_per_s"],
        unit_count=entry["units"],
        clock_hz=entry["clock_hz"],
        flop_per_s=tuple(entry["flop_per_s"].items()),
        link=entry["link"],
        unified=entry["unified"],
        capability=entry["capability"],
        features=frozenset(entry["features"]),
        source=sources[entry["source"]],
    )


def find_named(text: str) -> Datasheet:
    """The accelerator that a person means: "RTX 4090", "rtx4090", "4090", "M4 Max 128GB", "H100 80GB", or the driver's full name.

    A name without a size means the usual size, one that several variants share the first of them.

    Raises:
        UnknownAccelerator: nothing has this name (the nearest three are named), or different cards have it (all are).
    """
    shown = text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "..."
    key, memory = _key(text[:_LONGEST_NAME])
    if not key:
        raise UnknownAccelerator(f"gpu={shown!r}: no accelerator is named; write one such as 'RTX 4090' or 'M4 Max 128GB'", ())
    literal = _by_full_name().get(_squeezed(text))
    if literal is not None:
        return literal
    found = _named(key) or [sheet for sheet in datasheets() if _is_part(key) and any(k.endswith(key) for k in _keys(sheet))]
    if not found:
        near = _nearest(key)
        raise UnknownAccelerator(f"gpu={shown!r}: no such accelerator is known; the nearest are {', '.join(near)}", near)
    if memory is not None:
        sized = [replace(sheet, memory_bytes=memory) for sheet in found if memory in sheet.memory_options_bytes]
        if not sized:
            sizes = sorted({size // 2**30 for sheet in found for size in sheet.memory_options_bytes})
            near = [sheet.name for sheet in found]
            known = ", ".join(f"{size}GB" for size in sizes)
            raise UnknownAccelerator(f"gpu={shown!r}: {near[0]} is not sold with {memory // 2**30}GB; it has {known}", near)
        found = sized
    if len({_family(sheet, key) for sheet in found}) > 1:
        names = [sheet.name for sheet in found]
        raise UnknownAccelerator(f"gpu={shown!r} may be any of {', '.join(names)}; write the name in full", names)
    return found[0]


def datasheet_of(name: str, total_bytes: int) -> Datasheet | None:
    """The datasheet of a device that a driver reported, None where it is not known.

    Args:
        name: as the driver names it.
        total_bytes: as the driver reports them, somewhat less than is sold; of unified memory what the GPU is granted.
    """
    key, _ = _key(name[:_LONGEST_NAME])
    best: Datasheet | None = None
    for sheet in _named(key) if key else ():
        for option in sheet.memory_options_bytes:
            if sheet.unified:
                fits = best is None or abs(unified_bytes(option) - total_bytes) < abs(unified_bytes(best.memory_bytes) - total_bytes)
            else:
                fits = best is None and option * _REPORTED[0] <= total_bytes <= option * _REPORTED[1]
            if fits:
                best = replace(sheet, memory_bytes=option)
    return best


def _key(text: str) -> tuple[str, int | None]:
    """A name without what does not tell cards apart, and the memory in it in bytes."""
    lowered = text.lower()
    sizes = _MEMORY.findall(_spaced(lowered))
    bare = _MEMORY.sub(" ", _spaced(lowered))
    return re.sub(r"[^a-z0-9]", "", _NOISE.sub(" ", bare)), int(sizes[-1]) * 2**30 if sizes else None


def _spaced(text: str) -> str:
    """Hyphens and underscores as spaces, and a size apart from a name that it was glued to ("max128gb")."""
    return re.sub(r"(?<=[a-z])(?=\d+\s*(?:gib|gb)\b)", " ", re.sub(r"[-_/,]", " ", text))


@functools.lru_cache(maxsize=1)
def _index() -> dict[str, tuple[Datasheet, ...]]:
    index: dict[str, list[Datasheet]] = {}
    for sheet in datasheets():
        for key in _keys(sheet):
            index.setdefault(key, []).append(sheet)
    return {key: tuple(sheets) for key, sheets in index.items()}


def _keys(sheet: Datasheet) -> list[str]:
    return list(dict.fromkeys(_key(name)[0] for name in (sheet.name, *sheet.aliases)))


@functools.lru_cache(maxsize=1)
def _by_full_name() -> dict[str, Datasheet]:
    """Names and aliases, sizes included, that belong to one accelerator alone."""
    owners: dict[str, list[Datasheet]] = {}
    for sheet in datasheets():
        for name in {_squeezed(name) for name in (sheet.name, *sheet.aliases)}:
            owners.setdefault(name, []).append(sheet)
    return {name: sheets[0] for name, sheets in owners.items() if len(sheets) == 1}


def _squeezed(text: str) -> str:
    """A name in full but for its brands; "Quadro" stays, because it tells cards of one number apart."""
    return re.sub(r"\((?:r|tm)\)|nvidia|amd|intel|apple|geforce|radeon|instinct|tesla|[^a-z0-9]", "", text[:_LONGEST_NAME].lower())


def _is_part(key: str) -> bool:
    """Whether it says enough to be the end of a name ("4090", "7900xtx")."""
    return len(key) >= 3 and any(character.isdigit() for character in key)


def _named(key: str) -> list[Datasheet]:
    return list(_index().get(key, ()))


def _family(sheet: Datasheet, key: str) -> tuple[str, str]:
    """What makes two cards of one name different cards: their instruction set, and for a part of a name the name."""
    return sheet.capability or sheet.backend, "" if key in _keys(sheet) else sheet.name


def _nearest(key: str) -> list[str]:
    """Three names that look most like it, with or without the letters of their series."""

    def likeness(sheet: Datasheet) -> float:
        candidates = {form for name in _keys(sheet) for form in (name, re.sub(r"^(?:rtx|gtx|rx)", "", name))}
        return max(difflib.SequenceMatcher(None, key, form, autojunk=False).ratio() for form in candidates)

    return [sheet.name for sheet in sorted(datasheets(), key=likeness, reverse=True)[:3]]
