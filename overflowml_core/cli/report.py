"""``overflowml report``: what was counted while models with routed experts ran, and a picture of their heat."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overflowml_core.cli.files import check_target, write_file
from overflowml_core.cli.options import JsonOption
from overflowml_core.errors import OverflowmlError

if TYPE_CHECKING:
    from overflowml_core.cli.heat.picture import Row
    from overflowml_core.heat import BankHeat, Heat, Run

_PREFIX = re.compile(r"[0-9a-f]{4,64}", re.ASCII)
_FILES = "Files"
HEADINGS = ("Layer", "Hits", "MB/token", "In cache", "Busiest tenth", "Never chosen")


class UnknownRun(OverflowmlError):
    """A model of which no run was recorded."""

    def __init__(self, source: str, known: list[str]) -> None:
        self.source = source
        names = f"those of {', '.join(known[:8])} were" if known else "none was of any model"
        super().__init__(f"{source}: no run with experts outside of the device was recorded; {names}; run the model with overflow= first")


def report(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="Of this model: a folder, a Hub id, or the beginning of a fingerprint as the list of runs shows it.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write the picture as SVG; needs SOURCE.", rich_help_panel=_FILES)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write picture and figures as one page for a browser.", rich_help_panel=_FILES),
    ] = None,
) -> None:
    """Show what was counted while models with routed experts ran: hits of the cache, bytes a token, and which experts are chosen."""
    files = {"--svg": svg, "--html": html}
    for option, path in files.items():
        check_target(path, option)
        if path is not None and source is None:
            raise OverflowmlError(f"{option}={str(path)!r}: a picture is of one model; name it: overflowml report SOURCE {option} FILE")
    if source is None:
        _list_runs(as_json)
        return
    heat = find_heat(source)
    _write(heat, files)
    if as_json:
        typer.echo(json.dumps(document_of(heat), indent=2))
        return
    _show(heat)
    written = [f"{option}: {path}" for option, path in files.items() if path is not None]
    if written:
        from overflowml_core.cli.screen import Screen

        screen = Screen(stderr=True)
        for line in written:
            screen.text(f"written {line}", "dim")


def find_heat(source: str) -> Heat:
    """The heat map of a model.

    Args:
        source: the beginning of its fingerprint, what its runs were loaded from, or a folder.

    Raises:
        UnknownRun: there is none.
        BadHeat: there is one, and it is damaged.
        OverflowmlError: several models begin like this, or the folder is no model.
    """
    from overflowml_core.heat_store import heat_path, kept_maps, read_heat

    if _PREFIX.fullmatch(source) and not os.path.exists(source):
        found = [path for path in kept_maps() if path.stem.startswith(source)]
        if len(found) > 1:
            raise OverflowmlError(f"{source}: the fingerprints {', '.join(path.stem for path in found)} begin like this; write more of it")
        if found:
            return read_heat(found[0])
    maps, _ = _readable()
    named = [heat for heat in maps if any(source in (run.source, _source_words(run), heat.network) for run in heat.runs)]
    if len(named) == 1:
        return named[0]
    if os.path.exists(source):
        from overflowml_core import session

        fingerprint = session.describe(source).fingerprint
        try:
            return read_heat(heat_path(fingerprint), fingerprint)
        except FileNotFoundError:
            pass
    if named:
        raise OverflowmlError(
            f"{source}: runs of {len(named)} models are of this name; give one of {', '.join(h.fingerprint for h in named)}"
        )
    raise UnknownRun(source, sorted({_source_words(run) for heat in maps for run in heat.runs[-1:]}))


def document_of(heat: Heat) -> dict[str, Any]:
    """All that is known of a model's experts, as JSON values."""
    from overflowml_core.heat_reader import report_document

    run = heat.runs[-1] if heat.runs else None
    return {
        "fingerprint": heat.fingerprint,
        "network": heat.network,
        "heat": [
            {"component": b.component, "block": b.block, "per_token": b.per_token, "tokens": b.tokens, "shares": b.shares}
            for b in heat.banks
        ],
        "run": None if run is None else {**_run_document(run), "report": report_document(run.report)},
        "runs": [_run_document(one) for one in heat.runs],
    }


def _bank_document(bank: BankHeat) -> dict[str, Any]:
    return {
        "component": bank.component,
        "block": bank.block,
        "per_token": bank.per_token,
        "tokens": bank.tokens,
        "shares": bank.shares,
    }


def _run_document(run: Run) -> dict[str, Any]:
    counted = run.report
    return {
        "source": run.source,
        "device": run.device,
        "ended_s": run.ended_s,
        "tokens": counted.tokens,
        "passes": counted.passes,
        "hit_rate": counted.hit_rate,
        "bytes_per_token": counted.bytes_per_token,
        "pass_s": run.pass_s,
        "stall_s": counted.stall_s,
        "stall_share": run.stall_share,
        "slots": counted.slots,
        "slot_bytes": counted.slot_bytes,
        "prefetched": counted.prefetched,
        "prefetch_hits": counted.prefetch_hits,
        "on_cpu": counted.on_cpu,
    }


def _readable() -> tuple[list[Heat], list[str]]:
    """All maps that can be read, and what is wrong with the others."""
    from overflowml_core.heat import BadHeat
    from overflowml_core.heat_store import kept_maps, read_heat

    maps: list[Heat] = []
    damaged: list[str] = []
    for path in kept_maps():
        try:
            maps.append(read_heat(path))
        except BadHeat as error:
            damaged.append(str(error))
        except FileNotFoundError:  # another process was faster
            continue
    return maps, damaged


def _list_runs(as_json: bool) -> None:
    from overflowml_core.cli.screen import Column, Screen
    from overflowml_core.heat_store import heat_folder

    maps, damaged = _readable()
    runs = sorted(((heat, run) for heat in maps for run in heat.runs), key=lambda pair: pair[1].ended_s, reverse=True)
    if as_json:
        rows = [{"fingerprint": heat.fingerprint, "network": heat.network, **_run_document(run)} for heat, run in runs]
        typer.echo(json.dumps({"folder": str(heat_folder()), "runs": rows, "damaged": damaged}, indent=2))
        return
    screen = Screen()
    screen.heading("Runs with experts outside of the device")
    if not runs:
        screen.paragraph("none yet; a model whose plan is 'experts' is counted while it runs")
    else:
        columns = [
            Column("Model", style="bold"),
            Column("Fingerprint"),
            Column("When"),
            *(Column(heading, True) for heading in ("Tokens", "Hits", "MB/token", "Waited")),
        ]
        screen.table(columns, [[_source_words(run), heat.fingerprint[:8], _when(run), *_figures(run)] for heat, run in runs])
    told = Screen(stderr=True)
    for problem in damaged:
        told.paragraph(f"overflowml: {problem}", hanging="  ")


def _figures(run: Run) -> list[str]:
    counted = run.report
    return [
        str(counted.tokens),
        _share(counted.hit_rate),
        _megabytes(counted.bytes_per_token),
        _share(run.stall_share) if run.stall_share is not None else f"{counted.stall_s:.3g} s",
    ]


def _show(heat: Heat) -> None:
    from overflowml_core.cli.heat.picture import rows_of
    from overflowml_core.cli.heat.terminal import HeatScreen
    from overflowml_core.cli.screen import Column

    screen = HeatScreen()
    rows = rows_of(heat)
    screen.heading(_title(heat))
    for line in _lines(heat):
        screen.paragraph(line, hanging="  ")
    screen.text()
    screen.picture(rows)
    screen.text()
    screen.table([Column(heading, place > 0) for place, heading in enumerate(HEADINGS)], [_cells(row) for row in rows])


def _write(heat: Heat, files: dict[str, Path | None]) -> None:
    svg, html = files["--svg"], files["--html"]
    if svg is None and html is None:
        return
    from overflowml_core.cli.heat.drawing import drawing
    from overflowml_core.cli.heat.page import page_of
    from overflowml_core.cli.heat.picture import rows_of

    rows, figures = rows_of(heat), "; ".join(_lines(heat)[:1])
    if svg is not None:
        write_file(svg, f"{drawing(_title(heat), figures, rows)}\n", "--svg")
    if html is not None:
        write_file(html, page_of(_title(heat), figures, rows, HEADINGS, [_cells(row) for row in rows]), "--html")


def _title(heat: Heat) -> str:
    name = _source_words(heat.runs[-1]) if heat.runs else ""
    return f"Expert heat of {name} ({heat.network})" if name not in ("", heat.network) else f"Expert heat of {heat.network}"


def _lines(heat: Heat) -> list[str]:
    """The figures of the last run in words."""
    from overflowml_core.units import format_bytes

    if not heat.runs:
        return ["no run was recorded"]
    run = heat.runs[-1]
    counted = run.report
    tokens, hits, megabytes, waited = _figures(run)
    room = f"{counted.slots} slots of {format_bytes(counted.slot_bytes)}"
    lines = [f"last run {_when(run)} on {run.device}: {tokens} tokens, hits {hits}, {megabytes} MB/token, waited {waited}, {room}"]
    if counted.prefetched:
        used = counted.prefetch_hits / counted.prefetched
        lines.append(f"brought in ahead of time: {counted.prefetched} experts, of which {_share(used)} were used")
    if counted.on_cpu:
        lines.append(f"computed by the processor where they wait: {counted.on_cpu} experts")
    seen = max((bank.tokens for bank in heat.banks), default=0)
    lines.append(f"the heat below is of the last {seen} tokens of all runs")
    return lines


def _cells(row: Row) -> list[str]:
    cached = "?" if row.cached is None else f"{len(row.cached)} of {len(row.ratios)}"
    return [row.label, _share(row.hit_rate), _megabytes(row.bytes_per_token), cached, _share(row.busiest), str(row.unused)]


def _when(run: Run) -> str:
    return f"{datetime.fromtimestamp(run.ended_s):%Y-%m-%d %H:%M}"


def _share(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f} %"


def _megabytes(nbytes: float | None) -> str:
    return "?" if nbytes is None else f"{nbytes / 1e6:.3g}"


def _source_words(run: Run) -> str:
    from overflowml_core.cli.cache import source_words

    return source_words(run.source)
