"""What a module is taken for: its blocks, what belongs to none of them, and the bytes of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.runtime.component import describe_module, weight_facts
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.slab import lay_out
from overflowml_core.runtime.structure import dissect, find_blocks
from tests.runtime import models
from tests.runtime.build import Block, Stack, job, network, rows, slots_budget, stack


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in find_blocks(module)]


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i}" for i in range(count)]


def test_blocks_of_llama_are_its_layers() -> None:
    assert names(models.llama()) == numbered("model.layers", 4)


def test_blocks_of_text_encoders() -> None:
    assert names(models.t5()) == numbered("encoder.block", 2)
    assert names(models.clip_text()) == numbered("encoder.layers", 3)


def test_blocks_of_an_encoder_decoder_are_those_of_both() -> None:
    assert names(models.t5(encoder_only=False)) == numbered("encoder.block", 2) + numbered("decoder.block", 3)


def test_blocks_of_flux_are_double_and_single_blocks() -> None:
    assert names(models.flux_transformer()) == numbered("transformer_blocks", 2) + numbered("single_transformer_blocks", 3)


def test_blocks_of_a_unet_are_resnets_and_transformer_blocks_not_stages() -> None:
    found = find_blocks(models.sdxl_unet())
    kinds = {type(block).__name__ for _, block in found}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"}
    assert len(found) == 16
    assert "down_blocks.1.attentions.0.transformer_blocks.1" in names(models.sdxl_unet())


def test_blocks_of_an_autoencoder_are_its_resnets() -> None:
    found = names(models.autoencoder())
    assert len(found) == 10
    assert all(".resnets." in name for name in found)


def test_outermost_lists_are_cut_and_inner_ones_are_not() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Block(8) for _ in range(3))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(Stage() for _ in range(2))
            self.groups = nn.ModuleList([nn.ModuleList(Block(8) for _ in range(2)), nn.ModuleList([Block(8), Block(8)])])
            self.single = nn.ModuleList([Block(8)])

    assert names(Model()) == ["stages.0", "stages.1", "groups.0.0", "groups.0.1", "groups.1.0", "groups.1.1"]


def test_a_list_of_one_is_not_cut_but_the_list_inside_it_is() -> None:
    outer = nn.Module()
    outer.wrap = nn.ModuleList([Stack(2, 8)])
    assert names(outer) == ["wrap.0.blocks.0", "wrap.0.blocks.1"]


def test_leaf_layers_in_a_list_are_no_blocks() -> None:
    """Models read ``self.projections[i].weight`` without calling the layer, so it must stay."""
    module = nn.Module()
    module.projections = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    structure = dissect(module)
    assert structure.blocks == ()
    assert len(structure.fixed.weights) == 8


def test_declared_class_counts_only_from_two_instances_on() -> None:
    class Once(Stack):
        _repeated_blocks = ("Stack",)

    module = Once(2, 8)
    module.inner = Stack(2, 8)
    assert names(module) == ["blocks.0", "blocks.1", "inner.blocks.0", "inner.blocks.1"]
    module.other = Stack(2, 8)
    assert names(module) == ["blocks.0", "blocks.1", "inner", "other"]


def test_blocks_without_weights_are_left_out() -> None:
    module = nn.Module()
    module.acts = nn.ModuleList(nn.Sequential(nn.ReLU()) for _ in range(3))
    assert names(module) == []
    module.layers = nn.ModuleList([nn.Sequential(nn.ReLU()), Block(4), Block(4)])
    assert names(module) == ["layers.1", "layers.2"]


def test_layer_groups_that_are_called_several_times_are_one_unit() -> None:
    """ALBERT runs one group of layers again and again: its weights exist once."""
    module = models.albert()
    assert sum(fact.nbytes for fact in weight_facts(module)) == sum(p.nbytes for p in module.parameters())
    component = describe_module(module, "model")
    assert component.weight_count == sum(p.numel() for p in module.parameters())


def test_the_same_block_twice_in_a_list_is_one_block() -> None:
    module = Stack(3, 8)
    module.blocks[2] = module.blocks[0]
    assert names(module) == ["blocks.0", "blocks.1"]


def test_tied_weights_are_counted_once_and_know_all_their_places() -> None:
    module = models.llama(tied=True)
    structure = dissect(module)
    embedding = next(w for w in structure.fixed.weights if w.name == "model.embed_tokens.weight")
    assert [owner.module for owner in embedding.owners] == [module.model.embed_tokens, module.lm_head]
    component = describe_module(module, "model")
    assert component.weight_count == sum(p.numel() for p in module.parameters())
    assert component.weight_bytes == sum(p.nbytes for p in module.parameters())


def test_weights_shared_by_blocks_belong_to_none_of_them() -> None:
    module = Stack(3, 8)
    module.blocks[1].up.weight = module.blocks[0].up.weight
    module.blocks[2].down = nn.Linear(8, 8)
    structure = dissect(module)
    assert [w.name for w in structure.fixed.weights] == ["blocks.0.up.weight"]
    assert [unit.name for unit in structure.blocks] == ["blocks.2"]


def test_modules_shared_by_blocks_belong_to_none_of_them() -> None:
    """A layer that is the same object in two blocks must be there for both."""
    module = Stack(3, 8, hidden=4)
    module.blocks[2].down = module.blocks[0].down
    structure = dissect(module)
    assert [w.name for w in structure.fixed.weights] == ["blocks.0.down.weight"]


def test_modules_shared_by_a_block_and_the_outside_belong_to_the_outside() -> None:
    for first in (True, False):
        module = nn.Module()
        if first:
            module.norm = nn.LayerNorm(8)
        module.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3))
        if first:
            module.blocks[1][1] = module.norm
        else:
            module.norm = module.blocks[1][1]
        structure = dissect(module)
        assert {owner.module for w in structure.fixed.weights for owner in w.owners} == {module.norm}, first


def test_weights_shared_by_a_block_and_the_outside_belong_to_the_outside() -> None:
    module = Stack(2, 8, ends=True)
    module.blocks[1].up.weight = module.inlet.weight
    structure = dissect(module)
    assert "blocks.1.up.weight" not in [w.name for unit in structure.blocks for w in unit.weights]
    shared = next(w for w in structure.fixed.weights if w.name == "inlet.weight")
    assert len(shared.owners) == 2


@pytest.mark.parametrize(
    "build", [models.llama, models.t5, models.clip_text, models.flux_transformer, models.sdxl_unet, models.autoencoder]
)
def test_described_bytes_are_those_of_the_slabs(build) -> None:
    module = build()
    component, structure = describe_module(module, "model"), dissect(module)
    slabs = [lay_out(unit, None) for unit in structure.blocks]
    assert [block.slab_bytes for block in component.blocks] == [slab.nbytes for slab in slabs]
    fixed = lay_out(structure.fixed, None).nbytes
    buffers = sum(-(-b.nbytes // 512) * 512 for b in module.buffers())
    assert component.resident_bytes == fixed + buffers
    covered = {id(w.parameter) for unit in structure.units for w in unit.weights}
    assert covered == {id(p) for p in module.parameters()}


def test_described_bytes_are_those_that_the_runtime_allocates(tmp_path: Path, vgpu) -> None:
    module = models.llama()
    component = describe_module(module, "model")
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1), tier="pinned").attach(tmp_path)
    largest = max(b.slab_bytes for b in component.blocks)
    assert vgpu.taken_bytes == component.resident_bytes + 3 * largest
    assert engine.device.pinned.held_bytes == 3 * largest
    engine.detach()


def test_meta_and_loaded_modules_are_described_alike() -> None:
    module = models.llama()
    with torch.device("meta"):
        empty = type(module)(module.config)
    empty.tie_weights()
    assert describe_module(empty, "model") == describe_module(module, "model")


def test_tensor_subclasses_are_refused_by_name() -> None:
    class Quantized(torch.Tensor):
        pass

    module = Stack(2, 8)
    module.blocks[1].up.weight = nn.Parameter(torch.randn(8, 8).as_subclass(Quantized))
    with pytest.raises(Unsupported, match=r"blocks\.1\.up\.weight: a Quantized"):
        dissect(module)


def test_network_fingerprint_depends_on_shapes_not_values() -> None:
    assert network({"m": stack(seed=0)}).fingerprint == network({"m": stack(seed=1)}).fingerprint
    assert network({"m": stack(width=16)}).fingerprint != network({"m": stack(width=8)}).fingerprint


def test_a_shared_module_runs_streamed(tmp_path: Path) -> None:
    module = stack(4, 16, hidden=8)
    module.blocks[3].down = module.blocks[1].down
    expected = module(rows())
    engine = job(module, HostDevice(), budget_bytes=None).attach(tmp_path)
    assert torch.equal(module(rows()), expected)
    engine.detach()
