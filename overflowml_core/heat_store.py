"""Keeps heat maps in the cache folder, one small file for each network. A damaged one is named and left out: the model then starts cold."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overflowml_core import environment
from overflowml_core.expert_report import ExpertReport
from overflowml_core.facts import Network, digest
from overflowml_core.heat import BadHeat, Heat, Run, with_shares
from overflowml_core.heat_reader import LARGEST_HEAT_BYTES, heat_from_json, heat_to_json
from overflowml_core.inspect.files import write_whole

_log = logging.getLogger("overflowml")

MOST_MAPS = 64
"""Heat maps that are kept; the one written longest ago goes first."""

_PATIENCE_S, _GLANCE_S = 2.0, 0.01
"""How long another process is waited for that writes a map, and between two looks. After that the map is written all the same: then one
of the two increments is lost, and nothing else."""

_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Save:
    """What :func:`save_run` put into a map.

    Attributes:
        network: its fingerprint.
        name: what people call it.
        run: the run as it was counted.
        before: what the same run had counted when it was saved last.
    """

    network: str
    name: str
    run: Run
    before: ExpertReport | None = None


def heat_folder() -> Path:
    """The folder of heat maps; it may not exist yet."""
    return environment.cache_folder() / "heat"


def load_heat(fingerprint: str) -> Heat | None:
    """What is known of the experts of a network; None where nothing is, or where its file is damaged, with a warning that names it."""
    path = heat_path(fingerprint)
    try:
        return read_heat(path, fingerprint)
    except FileNotFoundError:
        return None
    except BadHeat as error:
        _log.warning("%s; the experts start cold", error)
        return None


def read_heat(path: Path, fingerprint: str | None = None) -> Heat:
    """The heat map in a file.

    Args:
        path: the file.
        fingerprint: of the network that it must be of.

    Raises:
        FileNotFoundError: there is none.
        BadHeat: it is damaged or cannot be read; the message names it.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_HEAT_BYTES + 1)
        heat = heat_from_json(raw)
        if fingerprint not in (None, heat.fingerprint):
            raise BadHeat(f"it is of network {heat.fingerprint[:64]!r}")
    except FileNotFoundError:
        raise
    except (BadHeat, OSError) as error:
        raise BadHeat(f"{path}: the heat map cannot be read ({error}); remove it, the next run makes it again") from None
    return heat


def heat_path(fingerprint: str) -> Path:
    """The file of a network. A fingerprint of a plugin's own may hold anything, and must not name another folder."""
    name = fingerprint if _FINGERPRINT.fullmatch(fingerprint) else digest(fingerprint)
    return heat_folder() / f"{name}.json"


def kept_maps() -> list[Path]:
    """The files of all heat maps, the one written last first."""
    return [path for _, path in sorted(_with_times(heat_folder()), reverse=True)]


def with_heat(network: Network) -> Network:
    """The network with what is known of the heat of its experts, the same network where nothing is."""
    if all(block.experts is None for component in network.components for block in component.blocks):
        return network
    heat = load_heat(network.fingerprint)
    return network if heat is None else with_shares(network, heat)


def save_run(saved: Save) -> bool:
    """Put a run into the heat map of its network. Two processes at once lose nothing but, at worst, one of the increments.

    Returns:
        Whether it was kept. A full or read-only disk is no reason to disturb the model: that is logged.
    """
    path = heat_path(saved.network)
    try:
        with _locked(path.parent):
            known = load_heat(saved.network) or Heat(saved.network, saved.name)
            write_whole(path, heat_to_json(known.with_run(saved.run, saved.before)).encode())
            _forget_oldest()
    except OSError as error:
        _log.warning("%s: the heat of experts is not kept (%s)", path, error)
        return False
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Have the folder for oneself, where the system knows locks and nobody holds it for too long."""
    from overflowml_core.runtime.file_lock import Lock, take

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        patient_until = time.monotonic() + _PATIENCE_S
        while take(descriptor) is Lock.BUSY and time.monotonic() < patient_until:
            time.sleep(_GLANCE_S)
        yield
    finally:
        os.close(descriptor)


def _forget_oldest() -> None:
    for path in kept_maps()[MOST_MAPS:]:
        path.unlink(missing_ok=True)


def _with_times(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("*.json"):
        try:
            yield path.stat().st_mtime_ns, path
        except OSError:  # another process was faster
            continue
