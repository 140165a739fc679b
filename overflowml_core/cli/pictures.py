"""``overflowml run``: makes a picture for each prompt of a file, and goes on where it was killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from overflowml_core.cli.options import JsonOption
from overflowml_core.errors import BadLimits, OverflowmlError

if TYPE_CHECKING:
    from overflowml_core.cli.running.folder import RunFolder
    from overflowml_core.cli.running.runner import Done, Job
    from overflowml_core.facts import Bytes

_LIMITS, _WORK = "Limits", "Work"
_SIZE = "such as 8GB or 512MiB"


def pictures(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="The folder of a diffusers pipeline.", show_default=False)],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help="A prompt a line, or .jsonl or .csv with prompt, negative, seed, width, height.")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the pictures; what is there already is not made again.")],
    vram: Annotated[
        str | None,
        typer.Option("--budget", "--vram", help=f"Budget of the compute tier, {_SIZE}; what is free by default.", rich_help_panel=_LIMITS),
    ] = None,
    ram: Annotated[str | None, typer.Option(help=f"RAM for weights outside the device, {_SIZE}.", rich_help_panel=_LIMITS)] = None,
    reserve: Annotated[str | None, typer.Option(help=f"Part of the budget kept for activations, {_SIZE}.", rich_help_panel=_LIMITS)] = None,
    dtype: Annotated[str | None, typer.Option(help="As from_pretrained takes it, such as bfloat16.", rich_help_panel=_WORK)] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Of the first picture; each has the next. Chosen by default.", rich_help_panel=_WORK),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N|auto", help="Prompts at once.", rich_help_panel=_WORK)] = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", rich_help_panel=_WORK)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", rich_help_panel=_WORK)] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels.", rich_help_panel=_WORK)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels.", rich_help_panel=_WORK)] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt, where the file has none.", rich_help_panel=_WORK)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Another argument of the pipeline's call; may be repeated.", rich_help_panel=_WORK
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Make them on a Ray cluster: local, auto or HOST:PORT; DIR may be a URL.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a picture for each prompt of a file. Started again after a kill, it goes on without losing or repeating one."""
    from overflowml_core.cli.running.pipeline import check_folder
    from overflowml_core.cli.running.prompts import read_prompts
    from overflowml_core.cli.running.runner import Job
    from overflowml_core.cli.running.settings import Settings, call_arguments
    from overflowml_core.facts import Limits

    asked = read_prompts(prompts)
    limits = Limits(_size(vram, "--budget"), _size(ram, "--ram"), _size(reserve, "--reserve"))
    call, count = call_arguments(set_ or [], steps, guidance), _count(batch)
    check_folder(pipeline)
    settings = Settings(_digest(pipeline), dtype, negative, width, height, call)
    job = Job(pipeline, asked, settings, limits, seed, count)
    if ray is not None:
        from overflowml_ray.command import run

        run(job, out, ray, as_json)
    elif "://" in out:
        raise BadLimits(f"--out={out!r}: a URL is for runs on a cluster; give --ray ADDRESS (local is this machine alone), or a folder")
    else:
        _run(job, Path(out), as_json)


def _digest(folder: Path) -> str:
    from overflowml_core.cli.running.settings import folder_digest

    try:
        return folder_digest(folder)
    except OSError as error:
        raise OverflowmlError(f"{error.filename or folder}: {error.strerror}; make the folder of the pipeline readable") from None


def _count(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 4096 and len(text) <= 4):
        raise BadLimits(f"--batch={text!r}: neither auto nor a whole number from 1 to 4096; leave it out to have it found")
    return int(text)


def _size(text: str | None, option: str) -> Bytes | None:
    from overflowml_core.facts import Bytes
    from overflowml_core.units import parse_bytes

    if option == "--reserve" and text is not None and text.strip() == "0":
        return Bytes(0)
    return None if text is None else Bytes(parse_bytes(text, option))


def _run(job: Job, out: Path, as_json: bool) -> None:
    from overflowml_core.cli.running.bar import pictures_bar
    from overflowml_core.cli.running.folder import RunFolder
    from overflowml_core.cli.running.runner import run_job
    from overflowml_core.cli.running.stopping import ended_by_sigterm

    with ended_by_sigterm(), RunFolder.opened(out) as folder:
        try:
            with pictures_bar() as tell:
                done = run_job(job, folder, tell)
        except (KeyboardInterrupt, SystemExit):
            _say_stopped(folder)
            raise
    if as_json:
        typer.echo(json.dumps(_document(done, out), indent=2))
    else:
        typer.echo(_sentence(done, out))


def _say_stopped(folder: RunFolder) -> None:
    if folder.header is not None:
        sys.stderr.write(
            f"overflowml: stopped with {len(folder.done)} of {folder.header.count} pictures in {folder.path}; "
            "the same command goes on from there\n"
        )


def _document(done: Done, out: Path) -> dict[str, object]:
    return {
        "pictures": done.made + done.found,
        "made": done.made,
        "found": done.found,
        "folder": str(out),
        "seed": done.seed,
        "batch": done.batch,
        "seconds": round(done.seconds, 3),
    }


def _sentence(done: Done, out: Path) -> str:
    from overflowml_core.cli.words import seconds_words

    there = f"{done.found} were there already, " if done.found else ""
    return (
        f"{done.made + done.found} pictures in {out}: {there}{done.made} made in {seconds_words(done.seconds)}, "
        f"seed {done.seed}, batch {done.batch}"
    )
