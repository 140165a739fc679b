"""The only file that reads environment variables, each with its meaning."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from overflowml_core.facts import Limits
from overflowml_core.units import parse_bytes

DISABLE = "OVERFLOWML_DISABLE"
"""Any value but empty and 0: hosts are left alone, and requests for overflowml are errors of the host's own."""
DISABLE_PLUGINS = "OVERFLOWML_DISABLE_PLUGINS"
"""Names of plugins that are not loaded, separated by commas."""
DEVICE_MEMORY = "OVERFLOWML_DEVICE_MEMORY"
"""Budget of the compute tier, such as 8GB, where the call gives none."""
HOST_MEMORY = "OVERFLOWML_HOST_MEMORY"
"""RAM for weights that wait outside the device, where the call gives none."""
RESERVE = "OVERFLOWML_RESERVE"
"""Part of the budget that is kept for activations and caches, where the call gives none."""
CACHE = "OVERFLOWML_CACHE"
"""Folder for packed weights and prepared assets; the platform's cache folder by default."""
CACHE_SIZE = "OVERFLOWML_CACHE_SIZE"
"""Most that packed weights kept in the cache folder may take, such as 100GB, or 0 to keep none; a quarter of the disk by default."""

PROGRESS = "OVERFLOWML_PROGRESS"
"""0: no progress bar while weights are brought in. There is none either where standard error is no terminal."""

TUNED = "OVERFLOWML_TUNED"
"""0: plans that ``overflowml tune`` kept are not used."""

RAY_ADDRESS = "RAY_ADDRESS"
"""Ray's own: HOST:PORT of the cluster that ``--ray auto`` means; what runs on this machine by default."""


def ray_address() -> str | None:
    """The cluster that Ray would take by itself, None where the user leaves it open."""
    return os.environ.get(RAY_ADDRESS) or None


def uses_tuned() -> bool:
    """Whether plans that were measured to be the fastest are used."""
    return os.environ.get(TUNED, "") != "0"


def shows_progress() -> bool:
    """Whether the user wants to see how far a load is."""
    return os.environ.get(PROGRESS, "") != "0"


def disabled() -> bool:
    """Whether the user turned the host integrations off."""
    return os.environ.get(DISABLE, "") not in ("", "0")


def disabled_plugins() -> frozenset[str]:
    """Names of the plugins that the user left out."""
    return frozenset(name.strip() for name in os.environ.get(DISABLE_PLUGINS, "").split(",") if name.strip())


def with_environment(limits: Limits) -> Limits:
    """Fill the limits that the caller left open from the environment.

    Raises:
        BadSize: a variable holds no size; the message names the variable's field and value.
    """
    updates: dict[str, str] = {}
    for field, variable in (("device_memory", DEVICE_MEMORY), ("host_memory", HOST_MEMORY), ("reserve", RESERVE)):
        value = os.environ.get(variable)
        if value and getattr(limits, field) is None:
            updates[field] = value
    return replace(limits, **updates) if updates else limits  # type: ignore[arg-type]


def cache_size_bytes() -> int | None:
    """The most that kept packed weights may take; None where the user leaves it open.

    Raises:
        BadSize: the variable holds no size; the message names it.
    """
    value = os.environ.get(CACHE_SIZE, "").strip()
    if not value:
        return None
    return 0 if value == "0" else parse_bytes(value, CACHE_SIZE)


def cache_folder() -> Path:
    """The folder for what can be made again; it may not exist yet."""
    explicit = os.environ.get(CACHE)
    if explicit:
        return Path(explicit).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "overflowml"
