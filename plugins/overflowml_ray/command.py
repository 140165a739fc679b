"""``overflowml run --ray ADDRESS``: the command's part that knows of clusters."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import typer

from overflowml_core.cli.running.bar import pictures_bar
from overflowml_core.cli.running.folder import RunFolder
from overflowml_core.cli.running.runner import Done, Job
from overflowml_core.cli.running.stopping import ended_by_sigterm
from overflowml_ray.connection import check_address, connected
from overflowml_ray.crew import Summary
from overflowml_ray.pictures import run_on_cluster
from overflowml_ray.storage import Storage, StorageRun, is_url


def run(job: Job, out: str, address: str, as_json: bool) -> None:
    """Make the pictures of a job on a cluster.

    Args:
        job: of the command line.
        out: a folder, or the URL of a storage.
        address: of the cluster.
        as_json: print what came of it as JSON.
    """
    check_address(address)  # before the folder is touched
    # Ray takes the signal for itself, and says what it sees of its processes on standard output, which is for the answer alone.
    with ended_by_sigterm(), _place(out) as folder, redirect_stdout(sys.stderr), connected(address) as ray, ended_by_sigterm():
        try:
            with pictures_bar() as tell:
                done, summary = run_on_cluster(ray, job, folder, tell, _note)
        except (KeyboardInterrupt, SystemExit):
            if folder.header is not None:
                _note(f"stopped with {len(folder.done)} of {folder.header.count} pictures in {out}; the same command goes on from there")
            raise
    typer.echo(json.dumps(_document(done, summary, out), indent=2) if as_json else _sentence(done, summary, out))


@contextlib.contextmanager
def _place(out: str) -> Iterator[RunFolder | StorageRun]:
    if is_url(out):
        yield StorageRun(Storage(out))
        return
    with RunFolder.opened(Path(out)) as folder:
        yield folder


def _note(words: str) -> None:
    sys.stderr.write(f"overflowml: {words}\n")
    sys.stderr.flush()


def _document(done: Done, summary: Summary, out: str) -> dict[str, object]:
    return {
        "pictures": done.made + done.found,
        "made": done.made,
        "found": done.found,
        "folder": out,
        "seed": done.seed,
        "batch": done.batch,
        "seconds": round(done.seconds, 3),
        "workers": summary.tasks,
        "set_aside": summary.aside,
        "redone": summary.counts.redone,
        "copies": summary.counts.copies,
        "messages": summary.counts.messages,
    }


def _sentence(done: Done, summary: Summary, out: str) -> str:
    from overflowml_core.cli.words import seconds_words

    there = f"{done.found} were there already, " if done.found else ""
    count = len(summary.tasks)
    by = f" by {count} worker{'' if count == 1 else 's'}" if count else ""
    redone = f", {summary.counts.redone} done again" if summary.counts.redone else ""
    return (
        f"{done.made + done.found} pictures in {out}: {there}{done.made} made{by} in {seconds_words(done.seconds)}{redone}, "
        f"seed {done.seed}, batch {done.batch}"
    )
