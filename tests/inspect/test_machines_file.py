"""Files of several machines: what they say, and what is refused, with the field and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overflowml_core.inspect.machine_file import BadMachine
from overflowml_core.inspect.machines_file import read_machines

HOST = {"total_bytes": "64GB", "core_count": 16}
DESK = {"name": "desk", "count": 2, "accelerators": ["RTX 4090"], "host": HOST}


def write(folder: Path, document: object) -> Path:
    path = folder / "machines.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_machines_have_names_and_counts(tmp_path: Path) -> None:
    other = {"accelerators": ["RTX 3090", "RTX 3090"], "host": HOST}
    desk, server = read_machines(write(tmp_path, {"machines": [DESK, other]}))
    assert (desk.name, desk.count, desk.machine.compute.name) == ("desk", 2, "NVIDIA GeForce RTX 4090")
    assert (server.name, server.count, len(server.machine.accelerators)) == ("machine 1", 1, 2)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "not JSON"),
        ("[]", "no list of 1 to 64 under 'machines'"),
        ({"machines": []}, "no list of 1 to 64"),
        ({"machines": [DESK] * 65}, "no list of 1 to 64"),
        ({"machines": [DESK, DESK]}, "'desk' stands twice"),
        ({"machines": ["RTX 4090"]}, r"machines\[0\]: no object"),
        ({"machines": [{**DESK, "count": 0}]}, r"machines\[0\].count=0"),
        ({"machines": [{**DESK, "count": True}]}, r"machines\[0\].count=True"),
        ({"machines": [{**DESK, "count": 600}, {**DESK, "name": "b", "count": 600}]}, "1200 machines; at most 1024"),
        ({"machines": [{**DESK, "name": "a\n"}]}, r"machines\[0\].name"),
        ({"machines": [{**DESK, "speed": 3}]}, r"machines\[0\] \(desk\): .*speed"),
        ({"machines": [{"name": "desk", "host": HOST}]}, "accelerators"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, document: object, words: str) -> None:
    with pytest.raises(BadMachine, match=words):
        read_machines(write(tmp_path, document))


def test_a_file_that_is_not_there_or_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadMachine, match="cannot be read"):
        read_machines(tmp_path / "none.json")
    with pytest.raises(BadMachine, match="longer than"):
        read_machines(write(tmp_path, " " * (4 * 2**20 + 1)))
