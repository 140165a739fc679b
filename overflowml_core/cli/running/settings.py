"""What a run is asked to do, as a value that can be kept beside the pictures and compared with that of a later call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overflowml_core.errors import BadLimits

_LARGEST_TEXT_BYTES = 2**20
"""Of files that count by their content; weights count by name, size and time of the last change."""

OURS = ("prompt", "negative_prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "height", "width")
"""Arguments of a pipeline's call that are the run's own."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything but the prompts that decides what a picture looks like.

    Attributes:
        pipeline: digest of the folder.
        dtype: as from_pretrained takes it, None for the host's own.
        negative: for prompts without one.
        width, height: in pixels, for prompts without a size.
        call: other arguments of the pipeline's call, by name.
    """

    pipeline: str
    dtype: str | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def folder_digest(folder: Path) -> str:
    """A digest of a pipeline's folder: its small files by content, its weights by name, size and time of the last change.

    Raises:
        OSError: a file cannot be read.
    """
    seen = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        seen.update(f"{path.relative_to(folder).as_posix()}\0{status.st_size}\0".encode())
        seen.update(path.read_bytes() if status.st_size <= _LARGEST_TEXT_BYTES else str(status.st_mtime_ns).encode())
    return seen.hexdigest()[:16]


def call_arguments(texts: list[str], steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Arguments of a pipeline's call from the command line.

    Args:
        texts: "name=value"; a value is read as JSON, and is a text where it is none.
        steps: denoising steps.
        guidance: guidance scale.

    Raises:
        BadLimits: a text has no name, or names what is the run's own.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise BadLimits(f"--set={text!r}: no argument of a pipeline; write name=value, such as true_cfg_scale=4.0")
        if name in OURS:
            raise BadLimits(f"--set={text!r}: {name} is set by the run itself; use the prompts' file or the options for it")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    named = {"num_inference_steps": ("--steps", steps), "guidance_scale": ("--guidance", guidance)}
    for name, (option, number) in named.items():
        if number is not None:
            if name in found:
                raise BadLimits(f"--set {name}={found[name]!r} and {option}={number}: give one of them")
            found[name] = number
    return found
