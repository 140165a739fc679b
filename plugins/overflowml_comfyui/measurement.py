"""What runs in the host were measured to take, kept from session to session beside the machine's calibration. Measures nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from overflowml_core.inspect.files import write_whole

_log = logging.getLogger("overflowml")

MOST_KEPT = 200
"""Pairs of model and size that are kept, the newest."""
_FILE_LIMIT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of a sampler.

    Attributes:
        step_s: seconds of one step, all of the sampler's time shared out.
        steps: steps that were counted.
        peak_bytes: most bytes taken of the device; None where the device does not count them.
        passes: calls of the model; more than the steps where a step takes several, as guidance may; 0 where they were not all of one size.
        samples: images or videos in each of them: twice the batch where guidance puts both into one.
        resident_bytes, streamed_bytes: of the weights, on the device while it sampled, and brought in for each pass.
        link_bytes_per_s: how fast they came, where computing waited for them; 0 where it did not, or nobody knows.
    """

    step_s: float
    steps: int
    peak_bytes: int | None = None
    passes: int = 0
    samples: int = 0
    resident_bytes: int = 0
    streamed_bytes: int = 0
    link_bytes_per_s: float = 0.0

    @property
    def pass_s(self) -> float | None:
        """Seconds of one call of the model; None where its calls were not counted, or not all alike."""
        return self.step_s * self.steps / self.passes if self.passes else None

    @property
    def activation_bytes(self) -> int | None:
        """What the device held beside weights at most; None where the device does not count."""
        return None if self.peak_bytes is None or self.peak_bytes < self.resident_bytes else self.peak_bytes - self.resident_bytes


class Measurements:
    """Measurements by what was run (``Part.key``) on one machine, in one small file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, key: str) -> Measurement | None:
        """The newest measurement, None where there is none."""
        return self._read().get(key)

    def links(self) -> list[float]:
        """How fast weights came in runs that waited for them, the newest last."""
        return [one.link_bytes_per_s for one in self._read().values() if one.link_bytes_per_s]

    def keep(self, key: str, measured: Measurement) -> None:
        """Keep a measurement; forget the oldest beyond ``MOST_KEPT``. A folder that cannot be written is a warning."""
        known = self._read()
        known.pop(key, None)
        known[key] = measured
        newest = list(known.items())[-MOST_KEPT:]
        try:
            write_whole(self._path, json.dumps({name: asdict(one) for name, one in newest}).encode())
        except OSError as error:
            _log.warning("%s: what was measured is not kept (%s); set OVERFLOWML_CACHE to a folder that can be written", self._path, error)

    def _read(self) -> dict[str, Measurement]:
        try:
            if self._path.stat().st_size > _FILE_LIMIT_BYTES:
                raise ValueError("it is larger than such a file can be")
            document = json.loads(self._path.read_text("utf-8"))
            return {str(name): _measurement(fields) for name, fields in document.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("%s: no measurements (%s); the next run replaces it", self._path, error)
            return {}


def _measurement(fields: Mapping[str, object]) -> Measurement:
    step_s, steps, peak_bytes = fields["step_s"], fields["steps"], fields["peak_bytes"]
    counts = {name: fields.get(name, 0) for name in ("passes", "samples", "resident_bytes", "streamed_bytes")}
    if not isinstance(step_s, (int, float)) or not 0 <= step_s < float("inf") or not isinstance(steps, int):
        raise ValueError(f"step_s={step_s!r}, steps={steps!r}")
    if peak_bytes is not None and not isinstance(peak_bytes, int):
        raise ValueError(f"peak_bytes={peak_bytes!r}")
    known: dict[str, int] = {}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name}={count!r}")
        known[name] = count
    rate = fields.get("link_bytes_per_s", 0.0)
    if not isinstance(rate, (int, float)) or not 0 <= rate < float("inf"):
        raise ValueError(f"link_bytes_per_s={rate!r}")
    return Measurement(float(step_s), steps, peak_bytes, **known, link_bytes_per_s=float(rate))
