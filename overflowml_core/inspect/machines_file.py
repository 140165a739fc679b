"""Files that list the machines of a cluster: bounded, typed, field by field, as a machine file is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overflowml_core.inspect.machine_file import BadMachine, machine_of_document, read_bounded
from overflowml_core.machine import Kind

_MOST_KINDS, _MOST_MACHINES = 64, 1024
_LONGEST_NAME = 100
_EXAMPLE = '{"machines": [{"name": "desk", "count": 2, "accelerators": ["RTX 4090"], "host": {"total_bytes": "64GB", "core_count": 16}}]}'


def read_machines(path: str | os.PathLike[str]) -> tuple[Kind, ...]:
    """The machines in a file: a list under "machines", each as in a machine file, with a name and how many there are of it.

    Raises:
        BadMachine: the file cannot be read, is longer than 4 MiB, no JSON, or says what no machines can be.
        UnknownAccelerator: it names an accelerator that is not known.
    """
    file = Path(path)
    raw = read_bounded(file, "machines file", f"write one like {_EXAMPLE}")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadMachine(f"machines file {file}: not JSON ({error}); write one like {_EXAMPLE}") from None
    entries = document.get("machines") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not 1 <= len(entries) <= _MOST_KINDS:
        raise BadMachine(f"machines file {file}: no list of 1 to {_MOST_KINDS} under 'machines'; write one like {_EXAMPLE}")
    kinds = tuple(_kind(entry, place) for place, entry in enumerate(entries))
    names = [kind.name for kind in kinds]
    if len(set(names)) < len(names):
        raise BadMachine(
            f"machines file {file}: {next(n for n in names if names.count(n) > 1)!r} stands twice; give each kind a name and a count"
        )
    if sum(kind.count for kind in kinds) > _MOST_MACHINES:
        raise BadMachine(f"machines file {file}: {sum(kind.count for kind in kinds)} machines; at most {_MOST_MACHINES} are planned for")
    return kinds


def _kind(entry: object, place: int) -> Kind:
    if not isinstance(entry, Mapping):
        raise BadMachine(f"machines[{place}]: no object; write one like {_EXAMPLE}")
    fields: dict[str, Any] = dict(entry)
    name, count = fields.pop("name", f"machine {place}"), fields.pop("count", 1)
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise BadMachine(f"machines[{place}].name: no text of 1 to {_LONGEST_NAME} printable characters")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_MACHINES:
        raise BadMachine(f"machines[{place}].count={str(count)[:40]}: no whole number from 1 to {_MOST_MACHINES}")
    try:
        return Kind(name, count, machine_of_document(fields))
    except BadMachine as error:
        raise BadMachine(f"machines[{place}] ({name}): {error}") from None
