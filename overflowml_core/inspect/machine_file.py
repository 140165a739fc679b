"""Writes a machine as JSON and reads one back, from files that anybody may have edited: bounded, typed, field by field."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from overflowml_core.errors import BadSize, OverflowmlError
from overflowml_core.inspect.datasheet import datasheet_of
from overflowml_core.inspect.host import pinnable_bytes
from overflowml_core.inspect.machine import assumed_cpu_rates, assumed_rates
from overflowml_core.inspect.named import named_machine
from overflowml_core.machine import Accelerator, ComputeRate, HostMemory, Machine, Rates
from overflowml_core.units import parse_bytes

MACHINE_SCHEMA = 1
FILE_LIMIT_BYTES = 4 * 2**20
"""A calibrated machine spends 40 bytes on an operation that was measured, and 2 KiB on everything else."""
MOST_OPERATIONS = 20_000
_MOST_ACCELERATORS = 64
_MOST_WORDS = 64
_LONGEST_TEXT = 400
_MOST_BYTES = 2**60
_HIGHEST_RATE = 1e21
_LONGEST_SECONDS = 1e6
_SOURCES = ("measured", "datasheet", "assumed")

_T = TypeVar("_T")


class BadMachine(OverflowmlError):
    """A description of a machine that cannot be read, or that contradicts itself."""


def machine_document(machine: Machine) -> dict[str, Any]:
    """The machine as a JSON object; :func:`machine_of_document` reads it back without loss."""
    return {"schema": MACHINE_SCHEMA, **_plain(machine)}


def machine_to_json(machine: Machine) -> str:
    """The machine as a JSON text, as ``overflowml detect --json`` prints it and ``--machine FILE`` takes it."""
    return json.dumps(machine_document(machine), indent=1)


def rates_document(rates: Rates) -> dict[str, Any]:
    """Rates as a JSON object; :func:`rates_of_document` reads it back."""
    return dict(_plain(rates))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def read_machine(path: str | os.PathLike[str]) -> Machine:
    """The machine in a file.

    Raises:
        BadMachine: the file is missing, longer than 4 MiB, no JSON, or says what no machine can be.
        UnknownAccelerator: it names an accelerator that is not known.
    """
    return machine_of_json(read_bounded(path, "machine file", "write one with 'overflowml detect --json'"))


def read_bounded(path: str | os.PathLike[str], what: str, way_out: str) -> bytes:
    """The bytes of a file that a user names.

    Args:
        path: of the file.
        what: it should be, for the error.
        way_out: what to do where it is none.

    Raises:
        BadMachine: it cannot be read, or is longer than 4 MiB.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            raw = stream.read(FILE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise BadMachine(f"{what} {file}: it cannot be read ({error}); {way_out}") from None
    if len(raw) > FILE_LIMIT_BYTES:
        raise BadMachine(f"{what} {file}: longer than {FILE_LIMIT_BYTES} bytes; {way_out}")
    return raw


def machine_of_json(text: str | bytes) -> Machine:
    """The machine in a JSON text, alone or under the key "machine" of a larger answer.

    Raises:
        BadMachine: as for :func:`read_machine`.
        UnknownAccelerator: as for :func:`read_machine`.
    """
    if len(text) > FILE_LIMIT_BYTES:
        raise BadMachine(f"machine: longer than {FILE_LIMIT_BYTES} characters; write one with 'overflowml detect --json'")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMachine(f"machine: not JSON ({error}); write one with 'overflowml detect --json'") from None
    if isinstance(document, dict) and isinstance(document.get("machine"), dict):
        document = document["machine"]
    return machine_of_document(document)


def machine_of_document(document: object) -> Machine:
    """The machine in a JSON object. ``accelerators`` and ``host`` must be there; what else is missing is assumed as for a named machine.

    An accelerator may be a name ("RTX 4090"), and every number of bytes a size ("24GB").

    Raises:
        BadMachine: a field is unknown, of the wrong type or out of bounds; the message names it and its value.
        UnknownAccelerator: as for :func:`read_machine`.
    """
    fields = _object(document, "machine", Machine, extra=("schema",))
    if fields.get("schema", MACHINE_SCHEMA) != MACHINE_SCHEMA:
        raise _bad("schema", fields["schema"], f"this version reads {MACHINE_SCHEMA}")
    host = _host(_required(fields, "host", "machine"))
    raw = _list(_required(fields, "accelerators", "machine"), "accelerators", _MOST_ACCELERATORS)
    accelerators = tuple(_accelerator(entry, f"accelerators[{i}]", i, host) for i, entry in enumerate(raw))
    rates = fields.get("rates")
    cpu = fields.get("cpu_rates")
    return Machine(
        accelerators=accelerators,
        host=host,
        rates=assumed_rates(host, accelerators) if rates is None else rates_of_document(rates, "rates"),
        disk_free_bytes=_bytes(fields.get("disk_free_bytes", 0), "disk_free_bytes"),
        environment=_words(fields.get("environment", []), "environment"),
        cpu_rates=None if cpu is None and ("cpu_rates" in fields or not accelerators) else _cpu_rates(cpu, host),
        named=_flag(fields.get("named", True), "named"),
    )


def rates_of_document(document: object, what: str = "rates") -> Rates:
    """Rates in a JSON object; rates that are missing are 0, unknown.

    Args:
        document: what :func:`rates_document` made.
        what: name of the field, for messages.

    Raises:
        BadMachine: as for :func:`machine_of_document`.
    """
    fields = _object(document, what, Rates)
    source = _text(fields.get("source", "assumed"), f"{what}.source")
    if source not in _SOURCES:
        raise _bad(f"{what}.source", source, f"it is one of {', '.join(_SOURCES)}")
    compute = _list(fields.get("compute", []), f"{what}.compute", _MOST_WORDS)
    operations = _list(fields.get("op_seconds", []), f"{what}.op_seconds", MOST_OPERATIONS)
    names = [f.name for f in dataclasses.fields(Rates) if f.name.endswith("_bytes_per_s")]
    return Rates(
        **{name: _rate(fields.get(name, 0), f"{what}.{name}") for name in names},
        source=source,
        compute=tuple(_compute(entry, f"{what}.compute[{i}]") for i, entry in enumerate(compute)),
        launch_s=_seconds(fields.get("launch_s", 0), f"{what}.launch_s"),
        op_seconds=tuple(_operation(entry, f"{what}.op_seconds[{i}]") for i, entry in enumerate(operations)),
    )


def _cpu_rates(document: object, host: HostMemory) -> Rates:
    return assumed_cpu_rates(host) if document is None else rates_of_document(document, "cpu_rates")


def _accelerator(document: object, what: str, place: int, host: HostMemory) -> Accelerator:
    if isinstance(document, str):
        bare = Machine((), host, Rates(0, 0, 0), 0)
        ram = host.total_bytes
        named = named_machine(document, ram_bytes=ram, base=bare).accelerators if document.strip() else ()
        if len(named) != 1:
            raise _bad(what, document, "it is not the name of one accelerator")
        return replace(named[0], index=place)
    fields = _object(document, what, Accelerator)
    total = _bytes(_required(fields, "total_bytes", what), f"{what}.total_bytes", least=1)
    accelerator = Accelerator(
        kind=_text(_required(fields, "kind", what), f"{what}.kind", pattern=r"[a-z][a-z0-9_]*"),
        name=_text(_required(fields, "name", what), f"{what}.name"),
        index=_whole(fields.get("index", place), f"{what}.index", _MOST_ACCELERATORS * 16),
        total_bytes=total,
        free_bytes=_part(fields.get("free_bytes", total), f"{what}.free_bytes", total),
        unified=_flag(fields.get("unified", False), f"{what}.unified"),
        backend=_text(fields.get("backend", fields["kind"]), f"{what}.backend"),
        rates=None if fields.get("rates") is None else rates_of_document(fields["rates"], f"{what}.rates"),
        features=_words(fields.get("features", []), f"{what}.features"),
        capability=_text(fields.get("capability", ""), f"{what}.capability"),
        driver=_text(fields.get("driver", ""), f"{what}.driver"),
        link=_text(fields.get("link", ""), f"{what}.link"),
    )
    if "rates" in fields:  # null: the machine's own hold for it
        return accelerator
    sheet = datasheet_of(accelerator.name, accelerator.total_bytes)
    return accelerator if sheet is None else replace(accelerator, rates=sheet.rates(0.0, accelerator.link))


def _host(document: object) -> HostMemory:
    fields = _object(document, "host", HostMemory)
    total = _bytes(_required(fields, "total_bytes", "host"), "host.total_bytes", least=1)
    available = _part(fields.get("available_bytes", total), "host.available_bytes", total)
    return HostMemory(
        total_bytes=total,
        available_bytes=available,
        pinnable_bytes=_part(fields.get("pinnable_bytes", pinnable_bytes(total, available)), "host.pinnable_bytes", total),
        core_count=_whole(_required(fields, "core_count", "host"), "host.core_count", 2**16, least=1),
        swap_bytes=_bytes(fields.get("swap_bytes", 0), "host.swap_bytes"),
        isa=_words(fields.get("isa", []), "host.isa"),
        cpu_name=_text(fields.get("cpu_name", ""), "host.cpu_name"),
    )


def _compute(document: object, what: str) -> ComputeRate:
    fields = _object(document, what, ComputeRate)
    return ComputeRate(
        kind=_text(_required(fields, "kind", what), f"{what}.kind"),
        dtype=_text(_required(fields, "dtype", what), f"{what}.dtype"),
        flop_per_s=_rate(_required(fields, "flop_per_s", what), f"{what}.flop_per_s"),
    )


def _operation(document: object, what: str) -> tuple[str, float]:
    pair = _list(document, what, 2)
    if len(pair) != 2:
        raise _bad(what, document, "it is a pair of signature and seconds")
    return _text(pair[0], what), _seconds(pair[1], what)


def _object(value: object, what: str, kind: type, extra: tuple[str, ...] = ()) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _bad(what, value, "it is not a JSON object")
    known = {field.name for field in dataclasses.fields(kind)} | set(extra)
    for name in value:
        if name not in known:
            raise BadMachine(f"machine: {what} has no field {_shown(name)}; it has {', '.join(sorted(known))}")
    return value


def _required(fields: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in fields:
        raise BadMachine(f"machine: {what}.{name} is missing; write a machine with 'overflowml detect --json' and edit it")
    return fields[name]


def _list(value: object, what: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise _bad(what, value, f"it is not a list of at most {most}")
    return value


def _bytes(value: object, what: str, least: int = 0) -> int:
    if isinstance(value, str):
        try:
            value = parse_bytes(value, what)
        except BadSize as error:
            raise BadMachine(f"machine: {error}") from None
    return _whole(value, what, _MOST_BYTES, least)


def _part(value: object, what: str, total: int) -> int:
    part = _bytes(value, what)
    if part > total:
        raise _bad(what, part, f"it is more than the total of {total}")
    return part


def _whole(value: object, what: str, most: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _bad(what, value, f"it is not a whole number from {least} to {most}")
    return value


def _rate(value: object, what: str) -> float:
    return _real(value, what, _HIGHEST_RATE)


def _seconds(value: object, what: str) -> float:
    return _real(value, what, _LONGEST_SECONDS)


def _real(value: object, what: str, most: float) -> float:
    # Comparisons of a whole number without end with a float are exact, and false here.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most or not math.isfinite(value):
        raise _bad(what, value, f"it is not a number from 0 to {most:.0e}")
    return float(value)


def _text(value: object, what: str, pattern: str = r".*") -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not re.fullmatch(pattern, value, re.S):
        raise _bad(
            what, value, f"it is not a text of at most {_LONGEST_TEXT} characters" if pattern == r".*" else "it is not a device type"
        )
    return value


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(what, value, "it is neither true nor false")
    return value


def _words(value: object, what: str) -> frozenset[str]:
    return frozenset(_each(_list(value, what, _MOST_WORDS), lambda word: _text(word, what)))


def _each(values: list[Any], read: Callable[[Any], _T]) -> list[_T]:
    return [read(value) for value in values]


def _bad(what: str, value: object, why: str) -> BadMachine:
    return BadMachine(f"machine: {what}={_shown(value)}: {why}; correct it, or write the file anew with 'overflowml detect --json'")


def _shown(value: object) -> str:
    """A value in a message; numbers without end and long texts are cut."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if not isinstance(value, str) or len(value) <= 80 else text + "..."
