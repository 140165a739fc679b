"""Tiny diffusers pipelines by name, and a run of each: text encoders on token ids, then the pipeline on their output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.hosts import pipeline_makers

TOKENS = torch.tensor([[5, 17, 42, 3, 88, 61, 20, 9, 31, 77, 12, 2]])
NEGATIVE = torch.zeros_like(TOKENS)


def _common() -> dict[str, Any]:
    return {"num_inference_steps": 2, "generator": torch.Generator("cpu").manual_seed(3), "output_type": "pt"}


def _run_flux(pipe: Any) -> Any:
    pooled, embeds = pipe.text_encoder(TOKENS).pooler_output, pipe.text_encoder_2(TOKENS)[0]
    return pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=16, width=16, **_common()).images


def _run_stable_diffusion(pipe: Any) -> Any:
    embeds, negative = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0]
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, height=32, width=32, **_common()).images


def _run_controlnet(pipe: Any) -> Any:
    embeds, negative = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0]
    torch.manual_seed(4)
    image = torch.rand(1, 3, 32, 32)
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, image=image, **_common()).images


def _run_sdxl(pipe: Any) -> Any:
    def encode(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        second = pipe.text_encoder_2(tokens, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], dim=-1), second[0]

    embeds, pooled = encode(TOKENS)
    negative, negative_pooled = encode(NEGATIVE)
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        height=32,
        width=32,
        **_common(),
    ).images


def _run_sd3(pipe: Any) -> Any:
    pooled = torch.cat([pipe.text_encoder(TOKENS)[0], pipe.text_encoder_2(TOKENS)[0]], dim=-1)
    embeds = pipe.text_encoder_3(TOKENS)[0]
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=-embeds,
        negative_pooled_prompt_embeds=-pooled,
        height=32,
        width=32,
        **_common(),
    ).images


def _run_masked(pipe: Any) -> Any:
    embeds, negative, mask = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0], torch.ones_like(TOKENS)
    return pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=mask,
        height=32,
        width=32,
        use_resolution_binning=False,
        **_common(),
    ).images


def _run_wan(pipe: Any) -> Any:
    embeds, negative = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0]
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, height=16, width=16, num_frames=5, **_common()).frames


def _run_ltx(pipe: Any) -> Any:
    embeds, negative, mask = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0], torch.ones_like(TOKENS)
    return pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=mask,
        height=32,
        width=32,
        num_frames=9,
        **_common(),
    ).frames


@dataclass(frozen=True)
class Family:
    """One pipeline: how to make it and how to run it."""

    make: Callable[[], Any]
    run: Callable[[Any], Any]


FAMILIES: dict[str, Family] = {
    "flux": Family(pipeline_makers.flux, _run_flux),
    "stable_diffusion": Family(pipeline_makers.stable_diffusion, _run_stable_diffusion),
    "controlnet": Family(pipeline_makers.controlnet, _run_controlnet),
    "sdxl": Family(pipeline_makers.sdxl, _run_sdxl),
    "sd3": Family(pipeline_makers.sd3, _run_sd3),
    "pixart": Family(pipeline_makers.pixart, _run_masked),
    "sana": Family(pipeline_makers.sana, _run_masked),
    "wan": Family(pipeline_makers.wan, _run_wan),
    "ltx": Family(pipeline_makers.ltx, _run_ltx),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of this family in this dtype; every weight has a value that nothing else has."""
    torch.manual_seed(11)
    pipe = FAMILIES[name].make()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.02)
            module.eval().to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, pipe: Any) -> Any:
    """The family's own run; two steps with a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return FAMILIES[name].run(pipe)


def without_tokenizers(name: str) -> dict[str, None]:
    """What ``from_pretrained`` must be given, because the tiny pipelines have no tokenizers."""
    absent: dict[str, dict[str, None]] = {
        "flux": {"tokenizer": None, "tokenizer_2": None},
        "sdxl": {"tokenizer": None, "tokenizer_2": None},
        "sd3": {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": None},
        "stable_diffusion": {"tokenizer": None, "safety_checker": None, "feature_extractor": None},
        "controlnet": {"tokenizer": None, "safety_checker": None, "feature_extractor": None},
    }
    return absent.get(name, {"tokenizer": None})
