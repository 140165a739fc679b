"""What else people do with a managed pipeline: IP-Adapters, textual inversion, callbacks, shared components, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch

import overflowml
from tests.hosts import pipelines
from tests.hosts.check import assert_same, assert_same_weights, whole_blocks

pytestmark = pytest.mark.usefixtures("unprofiled")
Saved = Callable[..., Path]


def pair(name: str, folder: Path, room_bytes: int = 100_000) -> tuple[Any, Any]:
    """A pipeline and a managed one."""
    absent = pipelines.without_tokenizers(name)
    limits = whole_blocks(folder, room_bytes, **absent)
    load = df.DiffusionPipeline.from_pretrained
    return load(folder, **absent), load(folder, overflow=limits, **absent)


def ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights as an IP-Adapter's file holds them, for embeddings of 16 numbers."""
    random, width = torch.Generator().manual_seed(5), 32
    proj = {"proj.weight": (4 * width, 16), "proj.bias": (4 * width,), "norm.weight": (width,), "norm.bias": (width,)}
    layers = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    keys: dict[str, torch.Tensor] = {}
    for k, name in enumerate(layers):
        out = unet.get_submodule(name.rpartition(".")[0]).to_k.out_features
        keys.update({f"{2 * k + 1}.to_{x}_ip.weight": torch.randn(out, width, generator=random) for x in "kv"})
    return {"image_proj": {key: torch.randn(shape, generator=random) for key, shape in proj.items()}, "ip_adapter": keys}


def test_ip_adapter_and_callbacks(saved_pipeline: Saved) -> None:
    theirs, ours = pair("stable_diffusion", saved_pipeline("stable_diffusion"))

    def run(pipe: Any) -> torch.Tensor:
        steps: list[int] = []

        def callback(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            steps.append(step)
            return {"latents": tensors["latents"] * 1.5}

        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            embeds, negative = pipe.text_encoder(pipelines.TOKENS)[0], pipe.text_encoder(pipelines.NEGATIVE)[0]
            image = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
            images = pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=negative,
                ip_adapter_image_embeds=[image],
                height=32,
                width=32,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(3),
                output_type="pt",
                callback_on_step_end=callback,
            ).images
        assert steps == [0, 1]
        return images

    weights = ip_adapter(theirs.unet)
    for pipe in (theirs, ours):
        pipe.load_ip_adapter({key: dict(part) for key, part in weights.items()}, None, None, image_encoder_folder=None)
    first = run(theirs)
    assert_same(run(ours), first)
    for pipe in (theirs, ours):
        pipe.set_ip_adapter_scale(0.3)
    assert not torch.equal(run(theirs), first)
    assert_same(run(ours), run(theirs))
    for pipe in (theirs, ours):
        pipe.unload_ip_adapter()
    assert_same(pipelines.run("stable_diffusion", ours), pipelines.run("stable_diffusion", theirs))


class Words:
    """As much of a tokenizer as textual inversion asks for."""

    def __init__(self) -> None:
        self._words = [str(i) for i in range(100)]

    def __len__(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words)}

    def add_tokens(self, word: str) -> None:
        self._words.append(word)

    def convert_tokens_to_ids(self, word: str) -> int:
        return self._words.index(word)


def test_textual_inversion(saved_pipeline: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair("stable_diffusion", saved_pipeline("stable_diffusion"))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(8))
    tokens = torch.tensor([[5, 100, 42, 3, 88, 61, 20, 9, 31, 77, 12, 2]])
    given = []
    for pipe in (theirs, ours):
        # Tiny pipelines have no tokenizer; what is looked at here is the text encoder.
        monkeypatch.setattr(pipe, "_check_text_inv_inputs", lambda *args: None)
        torch.manual_seed(0)
        pipe.load_textual_inversion({"<new>": vector}, token="<new>", tokenizer=Words())
        assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[100].detach(), vector)
        with torch.no_grad():
            given.append(pipe.text_encoder(tokens)[0])
    assert_same(given[1], given[0])
    overflowml.release(ours)
    assert_same_weights(ours.text_encoder, theirs.text_encoder)


def test_pipelines_share_components_and_one_release_gives_all_back(saved_pipeline: Saved) -> None:
    theirs, ours = pair("stable_diffusion", saved_pipeline("stable_diffusion"))
    expected = pipelines.run("stable_diffusion", theirs)
    others = [df.StableDiffusionPipeline(**ours.components, requires_safety_checker=False), df.StableDiffusionPipeline.from_pipe(ours)]
    for pipe in (*others, ours):
        assert_same(pipelines.run("stable_diffusion", pipe), expected)
        assert pipe is ours or not overflowml.release(pipe)
    assert overflowml.release(ours)
    for pipe in (*others, ours):
        assert_same(pipelines.run("stable_diffusion", pipe), expected)
        assert_same_weights(pipe.unet, theirs.unet)


def test_a_managed_pipeline_is_saved_with_its_true_weights(saved_pipeline: Saved, tmp_path: Path) -> None:
    theirs, ours = pair("controlnet", saved_pipeline("controlnet"))
    pipelines.run("controlnet", ours)
    ours.save_pretrained(tmp_path)
    again = df.DiffusionPipeline.from_pretrained(tmp_path, **pipelines.without_tokenizers("controlnet"))
    for name in ("unet", "controlnet", "vae", "text_encoder"):
        assert_same_weights(getattr(again, name), getattr(theirs, name))
