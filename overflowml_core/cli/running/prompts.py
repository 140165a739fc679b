"""Reads files of prompts: lines of text, JSON lines or CSV. Knows nothing of pipelines."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from overflowml_core.errors import OverflowmlError

_LARGEST_FILE_BYTES = 64 * 2**20
_MOST_PIXELS = 2**16
_LARGEST_SEED = 2**63 - 1
_OTHER_NAMES = {"negative_prompt": "negative", "text": "prompt"}


class BadPrompts(OverflowmlError):
    """A file of prompts that cannot be read, or says something that nobody can run."""

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        self.path, self.problem, self.line = path, problem, line
        where = "" if line is None else f", line {line}"
        super().__init__(
            f"--prompts={str(path)!r}{where}: {problem}; write a prompt a line, or JSON lines (.jsonl) or CSV (.csv) with prompt, "
            "negative, seed, width, height"
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """One picture that is asked for; None where the file leaves something open. Sizes in pixels."""

    prompt: str
    negative: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a file by its ending: ``.jsonl`` or ``.ndjson`` objects or texts, ``.csv`` with a heading, all others a prompt a line.

    Empty lines are left out. In JSON lines and CSV, ``size`` may stand for width and height ("768x512").

    Raises:
        BadPrompts: it is missing, holds no prompt, is no UTF-8, or a line cannot be read.
    """
    try:
        if path.is_file() and path.stat().st_size > _LARGEST_FILE_BYTES:
            raise BadPrompts(path, f"larger than {_LARGEST_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadPrompts(path, f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise BadPrompts(path, getattr(error, "strerror", None) or str(error)) from None
    read = {".jsonl": _of_json, ".ndjson": _of_json, ".csv": _of_csv}.get(path.suffix.lower(), _of_text)
    found = tuple(read(path, text))
    if not found:
        raise BadPrompts(path, "it holds no prompt")
    return found


def digest_of(prompts: tuple[Prompt, ...]) -> str:
    """SHA-256 over all prompts in order, as hex digits."""
    return hashlib.sha256(json.dumps([astuple(one) for one in prompts], separators=(",", ":")).encode()).hexdigest()


def _of_text(path: Path, text: str) -> Iterator[Prompt]:
    return (Prompt(line.strip()) for line in text.splitlines() if line.strip())


def _of_json(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadPrompts(path, f"no JSON ({error})", number) from None
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, Mapping):
            raise BadPrompts(path, f"expected an object or a text, found {line.strip()[:60]}", number)
        yield _prompt(path, value, number)


def _of_csv(path: Path, text: str) -> Iterator[Prompt]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise BadPrompts(path, f"not as many cells as the heading has ({len(rows.fieldnames or ())})", rows.line_num)
            yield _prompt(path, {name: cell for name, cell in row.items() if cell.strip()}, rows.line_num)
    except csv.Error as error:
        raise BadPrompts(path, f"no CSV ({error})", rows.line_num) from None


def _prompt(path: Path, value: Mapping[Any, Any], line: int) -> Prompt:
    given: dict[str, Any] = {}
    known = {field.name for field in fields(Prompt)}
    for key, item in value.items():
        name = str(key).strip().lower()
        name = _OTHER_NAMES.get(name, name)
        if item is None:
            continue
        if name == "size":
            width, cross, height = str(item).lower().partition("x")
            if not cross:
                raise BadPrompts(path, f"size={item!r}: not like 768x512", line)
            given |= {"width": width, "height": height}
        elif name in known:
            given[name] = item
        else:
            raise BadPrompts(path, f"unknown field {str(key)[:40]!r}", line)
    text, negative = given.get("prompt"), given.get("negative")
    if not isinstance(text, str) or not text.strip():
        raise BadPrompts(path, f"prompt={text!r}: no text", line)
    if negative is not None and not isinstance(negative, str):
        raise BadPrompts(path, f"negative={negative!r}: no text", line)
    numbers = {
        name: _number(path, name, given.get(name), line, smallest, largest)
        for name, smallest, largest in (("seed", 0, _LARGEST_SEED), ("width", 1, _MOST_PIXELS), ("height", 1, _MOST_PIXELS))
    }
    return Prompt(text.strip(), negative, **numbers)


def _number(path: Path, name: str, value: object, line: int, smallest: int, largest: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value.strip()) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise BadPrompts(path, f"{name}={value!r}: not a whole number from {smallest} to {largest}", line)
    return value
