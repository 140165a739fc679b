"""``overflowml cache``: the packed weights that are kept on disk, and how to be rid of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from overflowml_core.cli.options import JsonOption

if TYPE_CHECKING:
    from overflowml_core.runtime.kept_folder import KeptFolder, Listed


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one model, or of one component of a pipeline, in one form.

    Attributes:
        source: the folder that the weights come from.
        form: the dtype or format that they are in.
        blocks: how many of its blocks.
        file_bytes: of all their files.
        used_s: time of the last use, in seconds since 1970.
        in_use: blocks that a process uses now.
    """

    source: str
    form: str
    blocks: int
    file_bytes: int
    used_s: float
    in_use: int


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that no process uses.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the packed weights that are kept in the cache folder, or remove them; the next load packs again what it needs."""
    from overflowml_core import environment
    from overflowml_core.runtime.kept_folder import KeptFolder

    folder = KeptFolder(environment.cache_folder() / "packed", environment.cache_size_bytes())
    removed_blocks, removed_bytes = folder.clear() if clear else (0, 0)
    kept = list(grouped(folder.listed()))
    if as_json:
        document = {
            "folder": str(folder.path),
            "cap_bytes": folder.cap_bytes,
            "kept": [asdict(group) for group in kept],
            "removed": {"blocks": removed_blocks, "file_bytes": removed_bytes},
        }
        typer.echo(json.dumps(document, indent=2))
        return
    _show(folder, kept, (removed_blocks, removed_bytes) if clear else None)


def grouped(listed: Iterable[Listed]) -> Iterator[Kept]:
    """Kept slabs by what they are of, the latest used first."""
    groups: dict[tuple[str, str], list[Listed]] = defaultdict(list)
    for one in listed:
        groups[one.header.title.source, one.header.title.form].append(one)
    for (source, form), slabs in groups.items():
        file_bytes, in_use = sum(slab.file_bytes for slab in slabs), sum(slab.in_use for slab in slabs)
        yield Kept(source, form, len(slabs), file_bytes, max(slab.used_s for slab in slabs), in_use)


def source_words(source: str) -> str:
    """A folder as people know it: the Hub's name where it lies in the Hub's cache, else the path."""
    parts = PurePath(source).parts
    for index, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[index + 1] == "snapshots":
            return "/".join([*part.split("--")[1:], *parts[index + 3 :]])
    return source


def _show(folder: KeptFolder, kept: list[Kept], removed: tuple[int, int] | None) -> None:
    from datetime import datetime

    from overflowml_core.cli.screen import Column, Screen
    from overflowml_core.units import format_bytes

    screen = Screen()
    screen.heading("Packed weights")
    if removed is not None:
        screen.text(f"removed {removed[0]} blocks, {format_bytes(removed[1])}")
    if kept:
        columns = [
            Column("Source"),
            Column("Form"),
            Column("Blocks", True),
            Column("Size", True),
            Column("Last use"),
            Column("In use", True),
        ]
        rows = [
            [
                source_words(group.source),
                group.form,
                str(group.blocks),
                format_bytes(group.file_bytes),
                f"{datetime.fromtimestamp(group.used_s):%Y-%m-%d %H:%M}",
                str(group.in_use or ""),
            ]
            for group in kept
        ]
        screen.table(columns, rows)
    total = sum(group.file_bytes for group in kept)
    screen.text(f"{format_bytes(total)} of at most {format_bytes(folder.cap_bytes)} in {folder.path}")
