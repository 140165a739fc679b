"""Keeps plans that ``overflowml tune`` measured to be the fastest, and finds the one for a plan that would be made. Measures nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from overflowml_core import environment
from overflowml_core.errors import OverflowmlError, PlanMismatch
from overflowml_core.facts import Network, digest
from overflowml_core.inspect.calibration import hardware_of
from overflowml_core.inspect.files import write_whole
from overflowml_core.machine import Machine
from overflowml_core.plan import Plan
from overflowml_core.units import format_bytes, format_seconds

TUNED_SCHEMA = 1
MOST_TUNED = 64
"""Tuned plans that are kept; the one made longest ago goes first."""

_LARGEST_FILE_BYTES = 64 * 2**20
_MOST_TRIED = 64
_LONGEST_TEXT = 400
_MOST_SECONDS = 3e10
"""Seconds since 1970 up to which all systems know a date."""

_log = logging.getLogger("overflowml")


class BadTuned(OverflowmlError):
    """A tuned plan that cannot be used any more: its file is damaged, or it was made for something else."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan that was run: its strategy, what tells it from its neighbours, and seconds of a pass; None where nobody predicted it."""

    strategy: str
    what: str
    predicted_pass_s: float | None
    measured_pass_s: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest of several plans that were run.

    Attributes:
        plan: to be used from now on.
        pass_name: which kind of pass was measured ("token").
        tried: all that were run, the kept one too.
        kept: its place in ``tried``.
        made_s: when, in seconds since 1970.
    """

    plan: Plan
    pass_name: str
    tried: tuple[Tried, ...]
    kept: int
    made_s: float

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        kept = self.tried[self.kept]
        when = time.strftime("%Y-%m-%d", time.localtime(self.made_s))
        count = f"the fastest of {len(self.tried)} plans that were run" if len(self.tried) > 1 else "the only plan that was run"
        measured = f"{format_seconds(kept.measured_pass_s)} for each pass ({self.pass_name})"
        return f"tuned on {when}: {measured}, {kept.what}, {count}; OVERFLOWML_TUNED=0 plans without"


def tuned_folder() -> Path:
    """The folder of tuned plans; it may not exist yet."""
    return environment.cache_folder() / "tuned"


def tuned_path(plan: Plan, machine: Machine) -> Path:
    """The file of a tuned plan, by what a plan would be made for: network, hardware, limits and workload.

    Args:
        plan: as it is made without any tuning.
        machine: what it was made on.
    """
    return tuned_folder() / f"{_network_name(plan.network_fingerprint)}-{_machine_name(machine)}-{digest(_asked(plan))}.json"


def save_tuned(tuned: Tuned, base: Plan, machine: Machine) -> Path:
    """Keep a tuned plan in the place of the one that was kept for the same request, and forget the oldest beyond ``MOST_TUNED``.

    Args:
        tuned: what was found.
        base: the plan as it is made without any tuning.
        machine: what both were made on.

    Raises:
        OverflowmlError: the cache folder cannot be written.
    """
    from overflowml._version import __version__

    path = tuned_path(base, machine)
    document = {
        "schema": TUNED_SCHEMA,
        "version": __version__,
        "pass": tuned.pass_name,
        "tried": [asdict(one) for one in tuned.tried],
        "kept": tuned.kept,
        "made_s": tuned.made_s,
        "plan": json.loads(tuned.plan.to_json(indent=None)),
    }
    try:
        write_whole(path, json.dumps(document).encode())
        for _, old in sorted(_with_times(tuned_folder()), reverse=True)[MOST_TUNED:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise OverflowmlError(f"{path}: the tuned plan cannot be kept ({error}); set OVERFLOWML_CACHE to a folder that can") from None
    return path


def tuned_instead(plan: Plan, network: Network, machine: Machine) -> Tuned | None:
    """What was measured to be faster than a plan, for the same request. A file that is damaged or out of date is left out, with a warning
    that names it.

    Args:
        plan: as it is made without any tuning.
        network: what for.
        machine: what on; nothing was ever tuned on one that was named.

    Returns:
        The tuned plan, with the present budget; None where there is none.
    """
    if machine.named or not plan.managed or not tuned_folder().is_dir():
        return None
    path = tuned_path(plan, machine)
    try:
        tuned = read_tuned(path)
        _check_belongs(tuned.plan, plan, network)
        # What is free differs from day to day; the tuned plan goes by what is there now.
        now = replace(tuned.plan, budget=plan.budget, reasons=(tuned.sentence, *tuned.plan.reasons)).check()
    except FileNotFoundError:
        return None
    except OverflowmlError as error:
        _log.warning("%s: the tuned plan is not used (%s); run 'overflowml tune' again, or remove it", path, error)
        return None
    return replace(tuned, plan=now)


def read_tuned(path: Path) -> Tuned:
    """The tuned plan in a file.

    Raises:
        FileNotFoundError: there is none.
        BadTuned, BadPlan: it is damaged, or another version wrote it.
    """
    from overflowml._version import __version__

    try:
        with path.open("rb") as stream:
            raw = stream.read(_LARGEST_FILE_BYTES + 1)
        if len(raw) > _LARGEST_FILE_BYTES:
            raise BadTuned(f"longer than {_LARGEST_FILE_BYTES} bytes")
        document = json.loads(raw)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise BadTuned(f"not readable: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != TUNED_SCHEMA:
        raise BadTuned(f"not a tuned plan of schema {TUNED_SCHEMA}")
    if document.get("version") != __version__:
        raise BadTuned(f"written by version {str(document.get('version'))[:40]}, this is {__version__}")
    try:
        tried = tuple(_tried(one) for one in _bounded_list(document["tried"]))
        kept = document["kept"]
        if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept < len(tried):
            raise BadTuned("it does not say which plan was kept")
        plan = Plan.from_json(json.dumps(document["plan"]))
        return Tuned(plan, _text(document["pass"]), tried, kept, _seconds(document["made_s"]))
    except (KeyError, TypeError) as error:
        raise BadTuned(f"malformed ({type(error).__name__}: {error})") from None


def forget_tuned(network_fingerprint: str | None = None) -> int:
    """Remove tuned plans of a network, or of all.

    Returns:
        How many there were.

    Raises:
        OverflowmlError: one of them cannot be removed.
    """
    pattern = "*.json" if network_fingerprint is None else f"{_network_name(network_fingerprint)}-*.json"
    found = list(tuned_folder().glob(pattern))
    for path in found:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OverflowmlError(f"{path}: the tuned plan cannot be removed ({error}); remove it by hand") from None
    return len(found)


def _check_belongs(tuned: Plan, plan: Plan, network: Network) -> None:
    from overflowml_core.planner.rebuild import drafts_behind

    if tuned.network_fingerprint != plan.network_fingerprint or _asked(tuned) != _asked(plan):
        raise BadTuned("it was made for another model or another request")
    if tuned.formats != plan.formats:
        raise BadTuned(f"weights were converted into {', '.join(tuned.formats) or 'nothing'} then")
    outside_bytes = tuned.estimate.pinned_bytes + tuned.estimate.ram_bytes
    if outside_bytes > plan.budget.host_bytes:
        raise BadTuned(f"it takes {format_bytes(outside_bytes)} of RAM, of which {format_bytes(plan.budget.host_bytes)} are left now")
    try:
        drafts_behind(tuned, network, ())
    except PlanMismatch as error:
        raise BadTuned(str(error)) from None


def _asked(plan: Plan) -> dict[str, Any]:
    """What a plan was made for, but for the network and the machine, as JSON values."""
    limits = asdict(plan.limits)
    del limits["trial"]  # what is tried later is no part of the request
    limits["excluded"] = sorted(list(pair) for pair in limits["excluded"])
    return {"device": plan.device.partition(":")[0], "limits": limits, "workload": asdict(plan.workload)}


def _network_name(fingerprint: str) -> str:
    # A fingerprint of a plugin's own may hold anything, and must not name another folder.
    return fingerprint if fingerprint.isascii() and fingerprint.isalnum() and len(fingerprint) <= 64 else digest(fingerprint)


def _machine_name(machine: Machine) -> str:
    return digest(hardware_of(machine, environment.cache_folder()))


def _tried(document: Any) -> Tried:
    predicted = document["predicted_pass_s"]
    return Tried(
        _text(document["strategy"]),
        _text(document["what"]),
        None if predicted is None else _seconds(predicted),
        _seconds(document["measured_pass_s"]),
    )


def _bounded_list(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_TRIED:
        raise BadTuned(f"no list of at most {_MOST_TRIED} plans")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise BadTuned(f"no text of at most {_LONGEST_TEXT} characters")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST_SECONDS:
        raise BadTuned("a time is no number of seconds")
    return float(value)


def _with_times(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("*.json"):
        try:
            yield path.stat().st_mtime_ns, path
        except OSError:  # another process was faster
            continue
