"""Judges how things are set: variables, traps of the environment, plugins, activation."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from overflowml_core import environment
from overflowml_core.doctor.facts import Facts
from overflowml_core.doctor.report import Check
from overflowml_core.errors import BadSize
from overflowml_core.traps import findings
from overflowml_core.units import parse_bytes

_PREFIX = "OVERFLOWML_"
_SIZES = (environment.DEVICE_MEMORY, environment.HOST_MEMORY, environment.RESERVE, environment.CACHE_SIZE)
_VARIABLES = (*_SIZES, environment.DISABLE, environment.DISABLE_PLUGINS, environment.CACHE, environment.PROGRESS)


def check_variables(facts: Facts) -> Iterator[Check]:
    """The project's own variables."""
    unset = "set {}=" if "windows" in facts.machine.environment else "unset {}"
    wrong = False
    for name in sorted(facts.variables):
        value = facts.variables[name]
        if not name.startswith(_PREFIX):
            continue
        if name not in _VARIABLES:
            close = difflib.get_close_matches(name, _VARIABLES, 1)
            meant = f"; {close[0]} is meant" if close else ""
            yield Check("variable", "WARN", f"{name} is read by nobody", f"{unset.format(name)}{meant}")
            wrong = True
        elif name in _SIZES and value and (name, value.strip()) != (environment.CACHE_SIZE, "0"):
            try:
                parse_bytes(value, name)
            except BadSize as error:
                yield Check("variable", "FAIL", str(error), unset.format(name))
                wrong = True
        elif name == environment.DISABLE and value not in ("", "0"):
            yield Check("variable", "WARN", f"{name}={value}: the hosts are left alone, overflow= is unknown to them", unset.format(name))
            wrong = True
    if not wrong:
        yield Check("variable", "PASS", "variables OVERFLOWML_* are in order")


def check_traps(facts: Facts) -> Iterator[Check]:
    """Traps that the environment is in."""
    found = findings(facts.surroundings)
    for finding in found:
        yield Check(finding.trap, "WARN", finding.detail, finding.fix)
    if not found:
        yield Check("traps", "PASS", "none of the known traps of the environment")


def check_plugins(facts: Facts) -> Iterator[Check]:
    """Plugins that could not be loaded."""
    for name, reason in sorted(facts.faults.items()):
        fix = f"update or uninstall the package that brings it, or leave it out with {environment.DISABLE_PLUGINS}={name}"
        yield Check("plugin", "FAIL", f"plugin {name} cannot be used: {' '.join(reason.split())}", fix)
    if not facts.faults:
        yield Check("plugin", "PASS", f"plugins: {', '.join(facts.plugins) or 'none'}")


def check_activation(facts: Facts) -> Iterator[Check]:
    """Whether tools that load models by themselves can ask for overflowml."""
    if facts.activation == "stale":
        yield Check("activation", "WARN", "the environment was activated by another version", "overflowml activate")
    elif facts.activation == "active":
        yield Check("activation", "PASS", "activated: every interpreter of this environment knows device_map='overflowml'")
    else:
        yield Check("activation", "PASS", "not activated: programs import overflowml themselves (or: overflowml activate)")
