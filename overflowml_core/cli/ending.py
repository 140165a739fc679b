"""How a command ends: exit statuses, and errors as one line, or as JSON where JSON was asked for. Knows no command."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from overflowml_core.errors import DoesNotFit, OverflowmlError

YES = 0
"""Done, or the answer is yes."""
NO = 1
"""The answer is no: nothing fits, a check or a demo failed."""
WRONG_INPUT = 2
"""An option, a file or a source is wrong, or the answer is unknown; also what click and the shells use."""
INTERNAL_FAULT = 70
"""A fault of ours, or of a plugin: EX_SOFTWARE of sysexits.h. A traceback goes to standard error."""
INTERRUPTED = 130
"""Ctrl-C: 128 and the number of SIGINT, as shells report it."""
CLOSED_OUTPUT = 141
"""Whoever read our output stopped (``| head -1``): 128 and the number of SIGPIPE. Not 1, which would be an answer."""

EPILOG = (
    "Exit status: 0 done or yes, 1 no, 2 wrong input or unknown, 70 internal fault, 130 interrupted, 141 output closed, "
    "143 ended by SIGTERM."
)

_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base of what typer raises for wrong options. It comes from click, or from typer's own copy of click, by typer's version."""

_OPTION_OF = (
    (re.compile(r"\boverflow='(?P<value>[^']*)'"), r"--vram \g<value>"),
    (re.compile(r"\bhost_memory='(?P<value>[^']*)'"), r"--ram \g<value>"),
    (re.compile(r"\bquality='(?P<value>[a-z]+)'"), r"--quality \g<value>"),
    (re.compile(r"\ballow_disk=True\b"), "leave --no-disk out"),
)
"""What errors advise in Python, and the same on this command line."""


def ended(command: Callable[[], object], arguments: Sequence[str]) -> int:
    """Run a command and give its exit status. Errors of the project are one line on standard error, or a JSON
    object on standard output with ``--json`` among the arguments.

    Args:
        command: raises what typer raises without its stand-alone mode; returns its status, or None for 0.
        arguments: as the user wrote them.
    """
    as_json = "--json" in arguments
    _keep_printable()
    try:
        status = command()
        sys.stdout.flush()
        return status if isinstance(status, int) else YES
    except _UsageError as error:
        if as_json:
            return _print_json(error.format_message(), "UsageError", WRONG_INPUT)
        error.show()
        return WRONG_INPUT
    except OverflowmlError as error:
        status = NO if isinstance(error, DoesNotFit) else WRONG_INPUT
        if as_json:
            return _print_json(in_options(str(error)), type(error).__name__, status, **_misses(error))
        return _print_line(error, status)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("overflowml: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        return _closed()
    except SystemExit as asked:
        # Rich and click turn a closed output into a status of 1.
        return _closed() if isinstance(asked.__context__, BrokenPipeError) else _status_of(asked)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return _fault(error, as_json)
        _closed()
        sys.stderr.write(f"overflowml: the output cannot be written ({error.strerror}); make room, or write it elsewhere\n")
        return WRONG_INPUT
    except Exception as error:  # noqa: BLE001 -- the last resort: whatever it is, the status must not read like an answer
        return _fault(error, as_json)


def _fault(error: Exception, as_json: bool) -> int:
    traceback.print_exc()
    return _print_json(f"{type(error).__name__}: {error}", "internal", INTERNAL_FAULT) if as_json else INTERNAL_FAULT


def in_options(message: str) -> str:
    """An error's message with the command line's options instead of Python's arguments."""
    for pattern, option in _OPTION_OF:
        message = pattern.sub(option, message)
    return message


def _print_line(error: OverflowmlError, status: int) -> int:
    from overflowml_core.cli.screen import Screen

    screen, line = Screen(stderr=True), f"overflowml: {in_options(str(error))}"
    if screen.is_terminal:
        screen.paragraph(line, hanging="  ")
    else:
        screen.text(line)  # one line, for whoever searches it
    return status


def _print_json(message: str, kind: str, status: int, **more: object) -> int:
    try:
        sys.stdout.write(json.dumps({"error": message, "kind": kind, "exit_code": status, **more}, indent=2) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed()
    return status


def _misses(error: OverflowmlError) -> dict[str, object]:
    if not isinstance(error, DoesNotFit):
        return {}
    rows = [
        {"strategy": m.strategy, "needed_bytes": m.needed_bytes, "available_bytes": m.available_bytes, "remedy": in_options(m.remedy)}
        for m in error.near_misses
    ]
    return {"near_misses": rows}


def _status_of(asked: SystemExit) -> int:
    return asked.code if isinstance(asked.code, int) else YES if asked.code is None else NO


def _closed() -> int:
    # The interpreter flushes once more on its way out, and would complain.
    with contextlib.suppress(OSError, ValueError):  # a stream without a file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED_OUTPUT


def _keep_printable() -> None:
    if sys.stdout is None:  # started with its output closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- for as long as the process lives
    # A pipe on Windows may know 256 characters alone; a name in another script must not end the command.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
