"""The image pipeline of the demo: FLUX's real classes with random weights, a few steps, latents and image compared.

The image means nothing, since the weights are random; that it is the same to the last bit means everything. Imports torch
inside functions only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from overflowml_core.cli.demo.cases import Answer, Report
from overflowml_core.cli.demo.flux_assets import write_pipeline
from overflowml_core.facts import Limits

_PROMPT = "a lighthouse in a storm, oil on canvas"
_SIDE_PIXELS = 256
_STEPS = 4
_PROMPT_TOKENS = 64
_SEED = 7
IMAGE_NAME = "image.png"


class Flux:
    """See :class:`overflowml_core.cli.demo.cases.Case`."""

    def build(self, folder: Path, report: Report) -> None:
        """Write the pipeline."""
        write_pipeline(folder, report)

    def warm_up(self, folder: Path, device: str) -> None:
        """Import the pipeline's classes and run each kind of kernel that it uses, on small tensors."""
        import torch
        import torch.nn.functional as functional
        from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel  # noqa: F401 -- imported before the baseline
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        CLIPTokenizer.from_pretrained(folder / "tokenizer")
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
        del CLIPTextModel, T5EncoderModel
        with torch.inference_mode(), torch.device(device):
            row = torch.ones((64, 64), dtype=torch.bfloat16)
            functional.linear(row, row, row[0])
            functional.layer_norm(row, (64,))
            functional.gelu(row, approximate="tanh")
            heads = row.view(1, 1, 64, 64)
            functional.scaled_dot_product_attention(heads, heads, heads)
            picture = torch.ones((1, 32, 16, 16), dtype=torch.bfloat16)
            functional.conv2d(functional.group_norm(picture, 32), torch.ones((32, 32, 3, 3), dtype=torch.bfloat16), padding=1)

    def load(self, folder: Path, device: str, budget_bytes: int | None) -> object:
        """Load the pipeline."""
        import torch
        from diffusers import FluxPipeline

        if budget_bytes is None:
            pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
        else:
            pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, overflow=Limits(device_memory=budget_bytes))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, loaded: object, work: Path, report: Report) -> Answer:
        """Make one image, and keep the latents of the last step."""
        import torch

        pipe: Any = loaded
        digest = hashlib.sha256()

        def after_step(_pipe: object, step: int, _time: object, values: dict[str, Any]) -> dict[str, Any]:
            if step == _STEPS - 1:
                latents = values["latents"].detach().to("cpu").contiguous()
                if not bool(torch.isfinite(latents).all()):
                    raise ArithmeticError("the final latents are not finite")
                digest.update(latents.view(torch.uint8).numpy().tobytes())
            report("steps", step + 1, _STEPS)
            return values

        image = pipe(
            prompt=_PROMPT,
            height=_SIDE_PIXELS,
            width=_SIDE_PIXELS,
            num_inference_steps=_STEPS,
            guidance_scale=3.5,
            max_sequence_length=_PROMPT_TOKENS,
            generator=torch.Generator("cpu").manual_seed(_SEED),
            callback_on_step_end=after_step,
        ).images[0]
        pixels = image.tobytes()
        digest.update(pixels)
        image.save(work / IMAGE_NAME)
        return Answer(
            digest=digest.hexdigest(), text=f"image {image.width}x{image.height}, sha256 {hashlib.sha256(pixels).hexdigest()[:16]}"
        )


CASE = Flux()
