"""Every way in which a command can end has its status."""

from __future__ import annotations

import json

import pytest
import typer

from overflowml_core.cli import ending
from overflowml_core.errors import BadSize, DoesNotFit, NearMiss


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


def closed() -> None:
    try:
        raise BrokenPipeError
    except BrokenPipeError:
        raise SystemExit(1)  # noqa: B904 -- as rich and click do


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (lambda: None, 0),
        (lambda: 1, 1),
        (raising(DoesNotFit("no room")), 1),
        (raising(BadSize("--vram", "lots")), 2),
        (raising(typer.BadParameter("wrong")), 2),
        (raising(KeyboardInterrupt()), 130),
        (raising(typer.Abort()), 130),
        (raising(ZeroDivisionError("ours")), 70),
        (raising(OSError(5, "broken disk")), 70),
        (raising(OSError(28, "no room")), 2),
        (raising(SystemExit(3)), 3),
        (raising(SystemExit()), 0),
        (raising(BrokenPipeError()), 141),
        (closed, 141),
    ],
)
def test_status(command, status, capsys):
    assert ending.ended(command, []) == status
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error", [DoesNotFit("no room"), BadSize("--vram", "lots"), typer.BadParameter("wrong"), ZeroDivisionError("ours")]
)
def test_with_json_an_error_is_an_object_with_the_status(error, capsys):
    status = ending.ended(raising(error), ["plan", "--json"])
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["exit_code"] == status
    assert answer["error"]
    assert ("Traceback" in printed.err) == (status == 70)


def test_near_misses_are_part_of_the_object(capsys):
    miss = NearMiss("direct", 8, 4, "give overflow='8MB' or more")
    ending.ended(raising(DoesNotFit("no room", (miss,))), ["--json"])
    assert json.loads(capsys.readouterr().out)["near_misses"] == [
        {"strategy": "direct", "needed_bytes": 8, "available_bytes": 4, "remedy": "give --vram 8MB or more"}
    ]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("give overflow='8MB' or more", "give --vram 8MB or more"),
        ("give host_memory='8MB', allow_disk=True, or run", "give --ram 8MB, leave --no-disk out, or run"),
        ("try quality='any'", "try --quality any"),
        ("overflow is no option", "overflow is no option"),
    ],
)
def test_advice_names_the_options(message, told):
    assert ending.in_options(message) == told


def test_a_fault_of_ours_keeps_its_traceback(capsys):
    assert ending.ended(raising(ZeroDivisionError("ours")), []) == ending.INTERNAL_FAULT
    assert "ZeroDivisionError: ours" in capsys.readouterr().err
