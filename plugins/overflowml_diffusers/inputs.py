"""What a pipeline is called with when it runs on fake tensors: sizes from the workload, everything else as the host has it by default."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from overflowml_core.activations import ASSUMED_PIXELS
from overflowml_core.facts import Workload

ASSUMED_STEPS = 50
"""Denoising steps where neither the workload nor a pipeline names any: the default of most pipelines of diffusers."""

STEPS_LIMIT = 100
"""More steps than this are not run one by one; those that are run stand for the others."""

_NEEDS_IMAGE = re.compile(
    r"Img2Img|Image2Image|Inpaint|ImageTo|Image2|I2V|Control|Upscale|Edit|Fill|Kontext|Redux|Invers|Depth|PaintByExample|Pix2Pix|Variation|Video2Video"
)
_IMAGES = ("image", "control_image", "init_image", "example_image", "conditioning_image", "pose_image")
_MASKS = ("mask_image", "mask", "control_mask")
_VIDEOS = ("video", "control_video")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way of calling a pipeline: its arguments, and how many real calls each recorded one stands for."""

    arguments: dict[str, Any]
    scale: float


def attempts(pipe: Any, workload: Workload) -> Iterator[Attempt]:
    """Ways of calling a pipeline, the likeliest first: with an image where its class works on one, else without."""
    taken = inspect.signature(type(pipe).__call__).parameters
    plain, scale = _plain_arguments(pipe, taken, workload)
    pictures = _pictures(pipe, taken, plain, workload)
    first = bool(pictures) and (_NEEDS_IMAGE.search(type(pipe).__name__) is not None or _required(taken, pictures))
    orders = [{**plain, **pictures}, plain] if first else [plain, {**plain, **pictures}]
    for arguments in orders if pictures else [plain]:
        yield Attempt(arguments, scale)
        if "use_resolution_binning" in taken:  # a size that is none of the trained ones
            yield Attempt({**arguments, "use_resolution_binning": False}, scale)


def own_sizes(pipe: Any, workload: Workload) -> Workload:
    """A workload with what is open filled in by the pipeline's own defaults, for components that run without it."""
    taken = inspect.signature(type(pipe).__call__).parameters
    height, width = picture_size(pipe, taken, workload)
    frames = workload.frames or _default(taken, "num_frames")
    steps = workload.steps or _default(taken, "num_inference_steps")
    return replace(workload, height=height, width=width, frames=frames, steps=steps)


def _required(taken: Any, pictures: dict[str, Any]) -> bool:
    return any(taken[name].default is inspect.Parameter.empty for name in pictures)


def _plain_arguments(pipe: Any, taken: Any, workload: Workload) -> tuple[dict[str, Any], float]:
    steps = workload.steps or _default(taken, "num_inference_steps") or ASSUMED_STEPS
    run = min(int(steps), STEPS_LIMIT)
    values: dict[str, Any] = {
        "prompt": "a" if workload.batch == 1 else ["a"] * workload.batch,
        "height": workload.height,
        "width": workload.width,
        "num_frames": workload.frames,
        "num_inference_steps": run,
        "generator": torch.Generator("cpu").manual_seed(0),
        "output_type": "pt",
    }
    arguments = {name: value for name, value in values.items() if value is not None and name in taken}
    if "prompt" not in taken and "num_images_per_prompt" not in taken and "batch_size" in taken:
        arguments["batch_size"] = workload.batch
    return arguments, int(steps) / run


def _default(taken: Any, name: str) -> Any:
    parameter = taken.get(name)
    value = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _pictures(pipe: Any, taken: Any, plain: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Black images and white masks of the workload's size for every parameter that wants one."""
    from PIL import Image

    height, width = picture_size(pipe, taken, workload)
    found: dict[str, Any] = {}
    for names, mode, colour in ((_IMAGES, "RGB", 0), (_MASKS, "L", 255)):
        for name in names:
            if name in taken:
                found[name] = Image.new(mode, (width, height), colour)
    frames = workload.frames or _default(taken, "num_frames") or 16
    for name in _VIDEOS:
        if name in taken:
            found[name] = [Image.new("RGB", (width, height))] * int(frames)
    return found


def picture_size(pipe: Any, taken: Any, workload: Workload) -> tuple[int, int]:
    """(height, width) of a pipeline's pictures in pixels: the workload's, else the pipeline's own default."""
    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 8
    sample = getattr(pipe, "default_sample_size", None)
    if sample is None:
        config = getattr(getattr(pipe, "unet", None) or getattr(pipe, "transformer", None), "config", None)
        sample = getattr(config, "sample_size", None)
    own = sample * factor if isinstance(sample, int) else ASSUMED_PIXELS
    height = workload.height or _default(taken, "height") or own
    width = workload.width or _default(taken, "width") or own
    return int(height), int(width)
