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
_SIDE_PIXELS = {"bfloat16": 256, "float32": 128}
_STEPS = {"bfloat16": 4, "float32": 2}
"""By the dtype in which the VAE decodes: float32 on processors without bfloat16 arithmetic, where every step takes many times as long."""
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
            dtype = _decoding_dtype(device)
            picture = torch.ones((1, 32, 16, 16), dtype=dtype)
            functional.conv2d(functional.group_norm(picture, 32), torch.ones((32, 32, 3, 3), dtype=dtype), padding=1)

    def load(self, folder: Path, device: str, budget_bytes: int | None) -> object:
        """Load the pipeline."""
        import torch
        from diffusers import FluxPipeline

        dtypes = {"vae": _decoding_dtype(device), "default": torch.bfloat16}
        if budget_bytes is None:
            pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtypes).to(device)
        else:
            pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtypes, overflow=Limits(device_memory=budget_bytes))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, loaded: object, work: Path, report: Report) -> Answer:
        """Make one image, and keep the latents of the last step."""
        import torch

        pipe: Any = loaded
        digest = hashlib.sha256()
        decoding = pipe.vae.dtype
        dtype = str(decoding).rpartition(".")[2]
        side_pixels, steps = _SIDE_PIXELS[dtype], _STEPS[dtype]

        def after_step(_pipe: object, step: int, _time: object, values: dict[str, Any]) -> dict[str, Any]:
            if step == steps - 1:
                latents = values["latents"].detach().to("cpu").contiguous()
                if not bool(torch.isfinite(latents).all()):
                    raise ArithmeticError("the final latents are not finite")
                digest.update(latents.view(torch.uint8).numpy().tobytes())
                values["latents"] = values["latents"].to(decoding)
            report("steps", step + 1, steps)
            return values

        image = pipe(
            prompt=_PROMPT,
            height=side_pixels,
            width=side_pixels,
            num_inference_steps=steps,
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


def _decoding_dtype(device: str) -> Any:
    """bfloat16, or float32 on processors that have no bfloat16 arithmetic: there torch convolves in it a thousand times slower."""
    import torch

    native = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.float32 if torch.device(device).type == "cpu" and native is not None and not native() else torch.bfloat16


CASE = Flux()
