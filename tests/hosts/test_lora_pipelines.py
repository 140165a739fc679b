"""Adapters of managed pipelines: loaded, mixed, switched, fused and taken out, with the bits of a pipeline that nobody manages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import overflowml
from overflowml_core.facts import Tier
from tests.hosts import pipelines
from tests.hosts.check import assert_same, assert_same_weights, whole_blocks

pytestmark = pytest.mark.usefixtures("unprofiled")
Saved = Callable[..., Path]
State = dict[str, torch.Tensor]
TARGETS = {
    "flux": {"transformer": ["to_q", "linear", "x_embedder"], "text_encoder": ["q_proj"]},
    "stable_diffusion": {"unet": ["to_q", "conv1"], "text_encoder": ["q_proj"]},
}


class Pair:
    """A managed pipeline beside one that is not."""

    def __init__(self, name: str, folder: Path, room_bytes: int = 40_000) -> None:
        absent = pipelines.without_tokenizers(name)
        limits = whole_blocks(folder, room_bytes, **absent)
        self.name = name
        self.theirs = df.DiffusionPipeline.from_pretrained(folder, **absent)
        self.ours = df.DiffusionPipeline.from_pretrained(folder, overflow=limits, **absent)

    def do(self, change: Callable[[Any], object]) -> torch.Tensor:
        """The same to both; they must give the same image after it."""
        change(self.theirs)
        change(self.ours)
        expected = pipelines.run(self.name, self.theirs)
        assert_same(pipelines.run(self.name, self.ours), expected)
        return expected

    def check_weights(self) -> None:
        for name in TARGETS[self.name]:
            assert_same_weights(getattr(self.ours, name), getattr(self.theirs, name), managed=True)


def lora(name: str, seed: int) -> State:
    """Adapters for all of a family's targets, as a file of weights holds them."""
    pipe, state = pipelines.build(name), {}
    random = torch.Generator().manual_seed(seed)
    for part, targets in TARGETS[name].items():
        module = getattr(pipe, part)
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        for key, value in get_peft_model_state_dict(module, adapter_name="default").items():
            state[f"{part}.{key}"] = torch.randn(value.shape, generator=random) * 0.3
    return state


@pytest.mark.parametrize("name", TARGETS)
def test_the_whole_life_of_adapters(name: str, saved_pipeline: Saved) -> None:
    pair = Pair(name, saved_pipeline(name))
    streamed = overflowml.attachment(pair.ours).plan.placements()
    assert any(p.tier is Tier.DISK for p in streamed)
    first, second = lora(name, 1), lora(name, 2)
    images = [pair.do(lambda pipe: None)]
    images.append(pair.do(lambda pipe: pipe.load_lora_weights(dict(first), adapter_name="a")))
    pair.do(lambda pipe: pipe.load_lora_weights(dict(second), adapter_name="b"))
    images.append(pair.do(lambda pipe: pipe.set_adapters(["a", "b"], [0.5, 0.7])))
    assert_same(pair.do(lambda pipe: pipe.disable_lora()), images[0])
    pair.do(lambda pipe: pipe.enable_lora())
    pair.do(lambda pipe: pipe.delete_adapters("b"))
    images.append(pair.do(lambda pipe: pipe.fuse_lora(lora_scale=0.5)))
    pair.check_weights()
    pair.do(lambda pipe: pipe.unfuse_lora())
    pair.do(lambda pipe: pipe.fuse_lora(safe_fusing=True))
    pair.do(lambda pipe: pipe.unload_lora_weights())
    pair.check_weights()
    assert all(not torch.equal(one, other) for i, one in enumerate(images) for other in images[:i])
    overflowml.release(pair.ours)
    pair.do(lambda pipe: None)
    pair.check_weights()


def test_resident_blocks_make_room_and_come_back(saved_pipeline: Saved) -> None:
    folder, absent = saved_pipeline("flux"), pipelines.without_tokenizers("flux")
    least = whole_blocks(folder, **absent).device_bytes
    larger = overflowml.plan(folder, overflow=overflowml.Limits.exactly(device_memory=least + 120_000, reserve=0), **absent)
    # No byte is left in the phase, and some of its blocks are resident.
    pair = Pair("flux", folder, max(larger.phase_of("transformer").device_bytes - least, 0))
    plan = overflowml.attachment(pair.ours).plan
    before = [p.tier for p in plan.phase_of("transformer").placements]
    assert Tier.DEVICE in before
    pair.do(lambda pipe: pipe.load_lora_weights(lora("flux", 1), adapter_name="a"))
    since = overflowml.attachment(pair.ours).plan.phase_of("transformer")
    assert since.resident_bytes < plan.phase_of("transformer").resident_bytes
    pair.do(lambda pipe: pipe.unload_lora_weights())
    assert [p.tier for p in overflowml.attachment(pair.ours).plan.phase_of("transformer").placements] == before


def test_adapters_too_large_for_any_arrangement_are_refused_with_a_size(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    pair = Pair("flux", folder, room_bytes=0)
    pair.ours.load_lora_weights(lora("flux", 1), adapter_name="a")
    with pytest.raises(overflowml.DoesNotFit, match=r"transformer: adapters .* take \d+ bytes.*overflow='"):
        pipelines.run("flux", pair.ours)
    pair.ours.unload_lora_weights()
    assert_same(pipelines.run("flux", pair.ours), pipelines.run("flux", pair.theirs))
