"""A checkpoint without configuration becomes a network by its header: components by prefix, blocks by number, passes by shapes."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest

from overflowml_core.errors import BadCheckpoint, NotAModel
from overflowml_core.facts import Experts, TensorFact, Workload
from overflowml_core.inspect.image_shapes import image_component
from overflowml_core.inspect.single_file import network_of_file, network_of_weights
from overflowml_core.inspect.tensor_groups import ComponentName, find_groups

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}


def write(path, shapes, dtype="BF16"):
    """A file of tensors given by shape, or by (dtype, shape)."""
    tensors = {}
    for name, shape in shapes.items():
        kind, size = shape if shape and isinstance(shape[0], str) else (dtype, shape)
        tensors[name] = (kind, size, BYTES[kind])
    path.write_bytes(hub_server.safetensors_file(tensors))
    return path


def flop(profile, kind):
    works = [work for block in profile.blocks for work in block.works] + list(profile.outside)
    return sum(work.flop for work in works if work.kind == kind)


def flux_names(prefix="", double=2, single=3, width=64, text=96):
    """The tensors of FLUX.1 under the names of its first release."""
    shapes = {f"{prefix}img_in.weight": (width, 64), f"{prefix}txt_in.weight": (width, text), f"{prefix}img_in.bias": (width,)}
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"{prefix}double_blocks.{i}.{stream}"
            shapes |= {f"{block}_attn.qkv.weight": (3 * width, width), f"{block}_attn.proj.weight": (width, width)}
            shapes |= {f"{block}_mlp.0.weight": (4 * width, width), f"{block}_mlp.2.weight": (width, 4 * width)}
            shapes |= {f"{block}_mod.lin.weight": (6 * width, width), f"{block}_attn.norm.key_norm.scale": (16,)}
    for i in range(single):
        block = f"{prefix}single_blocks.{i}"
        shapes |= {f"{block}.linear1.weight": (7 * width, width), f"{block}.linear2.weight": (width, 5 * width)}
        shapes |= {f"{block}.modulation.lin.weight": (3 * width, width)}
    return shapes


def test_flux_of_full_size_has_the_work_that_was_traced():
    tensors = [TensorFact(name, shape, "BF16", 0) for name, shape in flux_names("", 19, 38, 3072, 4096).items()]
    found = image_component(ComponentName("model", ""), tensors, Workload())
    assert found.class_name == "FluxTransformer2DModel"
    (denoise,) = found.profiles
    assert flop(denoise, "matmul") == pytest.approx(59.5e12, rel=1e-3)
    assert flop(denoise, "attention") == 57 * 4 * 4608**2 * 3072


def test_blocks_are_the_outermost_numbered_entries_with_children(tmp_path):
    found = network_of_file(write(tmp_path / "flux.safetensors", flux_names()), Workload()).components[0]
    assert [b.name for b in found.blocks] == [*(f"double_blocks.{i}" for i in range(2)), *(f"single_blocks.{i}" for i in range(3))]
    assert found.name == "model"
    assert found.blocks[2].linear_count == 15 * 64**2
    assert found.resident_weight_count == 64 * 64 + 64 * 96 + 64


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["a.0.w", "a.1.w"], []),  # a list of plain layers
        (["a.0.x.w"], []),  # a single entry
        (["a.0.x.w", "a.1.x.w", "b"], ["a.0", "a.1"]),
        (["a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w"], ["a.0", "a.1"]),  # the outermost
        (["a.10.x.w", "a.9.x.w"], ["a.9", "a.10"]),  # by number, not by spelling
        (["output_blocks.0.0.w", "output_blocks.1.0.w", "input_blocks.0.0.w", "input_blocks.1.0.w"], None),
    ],
)
def test_groups(names, blocks):
    groups, outside = find_groups([TensorFact(name, (2,), "F32", 8) for name in names])
    expected = ["input_blocks.0", "input_blocks.1", "output_blocks.0", "output_blocks.1"] if blocks is None else blocks
    assert [group.name for group in groups] == expected
    assert sum(len(group.tensors) for group in groups) + len(outside.tensors) == len(names)


def checkpoint():
    """A whole pipeline in the manner of SDXL, very small."""
    shapes = flux_names("model.diffusion_model.")
    for i in range(2):
        clip = f"conditioner.embedders.0.transformer.text_model.encoder.layers.{i}"
        shapes |= {f"{clip}.self_attn.{n}_proj.weight": (32, 32) for n in ("q", "k", "v", "out")}
        shapes |= {f"{clip}.mlp.fc1.weight": (128, 32), f"{clip}.mlp.fc2.weight": (32, 128)}
    shapes["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"] = (100, 32)
    shapes |= {"first_stage_model.decoder.conv_in.weight": (16, 4, 3, 3), "first_stage_model.decoder.conv_out.weight": (3, 8, 3, 3)}
    shapes |= {f"first_stage_model.decoder.up.{i}.block.0.conv1.weight": (16, 16, 3, 3) for i in range(4)}
    shapes |= {f"first_stage_model.decoder.up.{i}.upsample.conv.weight": (16, 16, 3, 3) for i in range(1, 4)}
    shapes |= {f"first_stage_model.encoder.down.{i}.block.0.conv1.weight": (16, 16, 3, 3) for i in range(4)}
    return shapes


def test_a_checkpoint_of_a_pipeline_is_taken_apart(tmp_path):
    shapes = checkpoint() | {"alphas_cumprod": (7,), "model_ema.decay": (1,)}
    network = network_of_file(write(tmp_path / "all.safetensors", shapes), Workload(height=64, width=64))
    assert [(c.name, c.class_name) for c in network.components] == [
        ("text_encoder", "CLIPTextModel"),
        ("transformer", "FluxTransformer2DModel"),
        ("vae", "AutoencoderKL"),
    ]
    assert network.class_name == "a pipeline around FluxTransformer2DModel"
    counted = [shape for name, shape in shapes.items() if not name.startswith("model_ema.")]
    total = 0
    for shape in counted:
        size = 2
        for dim in shape:
            size *= dim
        total += size
    assert network.weight_bytes == total  # tensors of no component are counted too
    assert [[p.name for p in c.profiles] for c in network.components] == [["encode"], ["denoise"], ["decode"]]


def test_the_decoder_runs_from_the_coarsest_stage_and_leaves_the_encoder_out(tmp_path):
    vae = network_of_file(write(tmp_path / "all.safetensors", checkpoint()), Workload(height=64, width=64)).components[-1]
    (decode,) = vae.profiles
    calls = {block.name: work.calls for block, work in zip(vae.blocks, decode.blocks, strict=True)}
    assert calls == {f"encoder.down.{i}": 0 for i in range(4)} | {f"decoder.up.{i}": 1 for i in range(4)}
    decoders = [b.name for b in vae.blocks if b.name.startswith("decoder")]
    assert decoders == ["decoder.up.3", "decoder.up.2", "decoder.up.1", "decoder.up.0"]
    conv = [
        sum(w.flop for w in work.works if w.kind == "conv")
        for block, work in zip(vae.blocks, decode.blocks, strict=True)
        if block.name in decoders
    ]
    one = 2 * 9 * 16 * 16 * 8 * 8
    assert conv == [one * (1 + 4), one * (4 + 16), one * (16 + 64), one * 64]


def unet(prefix=""):
    """Two resolutions, in the names of Stable Diffusion's first release."""
    shapes = {f"{prefix}input_blocks.0.0.weight": (32, 4, 3, 3), f"{prefix}out.2.weight": (4, 32, 3, 3)}
    shapes |= {f"{prefix}input_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3), f"{prefix}input_blocks.1.0.emb_layers.1.weight": (32, 128)}
    shapes |= {f"{prefix}input_blocks.2.0.op.weight": (32, 32, 3, 3)}
    attention = f"{prefix}middle_block.1.transformer_blocks.0.attn"
    shapes |= {f"{prefix}middle_block.0.in_layers.2.weight": (32, 32, 3, 3), f"{prefix}middle_block.1.norm.weight": (32,)}
    shapes |= {f"{attention}1.to_{n}.weight": (32, 32) for n in "qkv"}
    shapes |= {f"{attention}2.to_q.weight": (32, 32), f"{attention}2.to_k.weight": (32, 48), f"{attention}2.to_v.weight": (32, 48)}
    shapes |= {f"{prefix}output_blocks.0.0.in_layers.2.weight": (32, 32, 3, 3), f"{prefix}output_blocks.0.1.conv.weight": (32, 32, 3, 3)}
    shapes |= {f"{prefix}output_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3)}
    return shapes


def test_a_unet_falls_and_rises_in_resolution(tmp_path):
    path = write(tmp_path / "sd.safetensors", unet("model.diffusion_model."))
    found = network_of_file(path, Workload(height=128, width=128, steps=30)).components[0]
    assert (found.name, found.class_name) == ("unet", "UNet2DConditionModel")
    (denoise,) = found.profiles
    assert denoise.count == 30
    whole, half, batch = 16 * 16, 8 * 8, 2
    one = 2 * 9 * 32 * 32 * batch
    by_block = {b.name: sum(w.flop for w in work.works if w.kind == "conv") for b, work in zip(found.blocks, denoise.blocks, strict=True)}
    assert by_block == {
        "input_blocks.1": one * whole,
        "input_blocks.2": one * half,
        "middle_block.0": one * half,
        "middle_block.1": 0,
        "output_blocks.0": one * (half + whole),
        "output_blocks.1": one * whole,
    } | {"input_blocks.0": by_block.get("input_blocks.0", 0)}
    assert flop(denoise, "matmul") == 2 * batch * (half * 4 * 32 * 32 + 77 * 2 * 32 * 48)
    assert flop(denoise, "attention") == 4 * batch * half * 32 * (half + 77)


def language(layers=2, width=64, kv=32, feedforward=128, vocabulary=96):
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.q_proj.weight": (width, width), f"{layer}.self_attn.o_proj.weight": (width, width)}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (kv, width) for n in "kv"}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (feedforward, width) for n in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, feedforward)
    return shapes


def test_a_language_model_without_configuration(tmp_path):
    found = network_of_file(write(tmp_path / "m.safetensors", language()), Workload(prompt_tokens=10, new_tokens=3)).components[0]
    prefill, token = found.profiles
    assert token.cache_bytes == 2 * 2 * 32 * 2 * 13
    assert token.flop > 0
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    assert flop(prefill, "matmul") == 2 * 10 * 2 * layer + 2 * 96 * 64
    assert flop(prefill, "attention") == 2 * 4 * 10 * 10 * 64


def test_experts_of_a_language_model_without_configuration(tmp_path):
    shapes = {name: shape for name, shape in language().items() if ".mlp." not in name}
    for i in range(2):
        shapes |= {f"model.layers.{i}.mlp.experts.{e}.{n}_proj.weight": (64, 64) for e in range(4) for n in ("gate", "up", "down")}
    found = network_of_file(write(tmp_path / "m.safetensors", shapes), Workload()).components[0]
    assert found.blocks[0].experts == Experts(4, 3 * 64 * 64 * 2, 2)
    assert "2 experts a token assumed" in found.profiles[0].note


def test_weights_in_eight_bits_keep_their_format(tmp_path):
    shapes = {name: ("F8_E4M3", shape) if len(shape) == 2 else shape for name, shape in flux_names().items()}
    found = network_of_file(write(tmp_path / "m.safetensors", shapes), Workload()).components[0]
    assert all(block.keep_format and block.linear_count == 0 for block in found.blocks)
    assert {work.dtype for work in found.profiles[0].blocks[0].works} == {"BF16"}  # computed in


def test_float32_computes_in_float32(tmp_path):
    found = network_of_file(write(tmp_path / "m.safetensors", flux_names(), "F32"), Workload()).components[0]
    assert {work.dtype for work in found.profiles[0].blocks[0].works} == {"F32"}


def test_an_unknown_model_is_described_without_passes(tmp_path):
    found = network_of_file(write(tmp_path / "m.safetensors", {"a.0.x.w": (4, 4), "a.1.x.w": (4, 4)}), Workload()).components[0]
    assert (found.class_name, found.profiles, found.activation_source) == ("an unknown model", (), "none")
    assert len(found.blocks) == 2


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({}, "no weights"),
        ({"a": (0, 4)}, "no weights"),
        ({"x.lora_A.weight": (4, 4), "x.lora_B.weight": (4, 4), "x.alpha": (1,)}, "LoRA alone"),
    ],
)
def test_files_without_a_model_are_named(tmp_path, shapes, words):
    with pytest.raises(NotAModel, match=words):
        network_of_file(write(tmp_path / "m.safetensors", shapes), Workload())


@pytest.mark.parametrize("raw", [b"", struct.pack("<Q", 10**18) + b"{}", struct.pack("<Q", 2) + b"[]", b"x" * 100])
def test_broken_files_are_named(tmp_path, raw):
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with pytest.raises(BadCheckpoint, match=r"m\.safetensors"):
        network_of_file(path, Workload())


def test_a_folder_of_shards_is_one_model_and_other_files_are_not(tmp_path):
    names = list(language().items())
    write(tmp_path / "m-00001-of-00002.safetensors", dict(names[:5]))
    write(tmp_path / "m-00002-of-00002.safetensors", dict(names[5:]))
    assert (
        network_of_weights(tmp_path, Workload()).fingerprint
        == network_of_file(write(tmp_path.parent / "whole.safetensors", dict(names)), Workload()).fingerprint
    )
    write(tmp_path / "vae.safetensors", {"w": (2,)})
    with pytest.raises(NotAModel, match="give a file"):
        network_of_weights(tmp_path, Workload())


def test_a_folder_with_a_shard_missing_is_refused(tmp_path):
    write(tmp_path / "m-00001-of-00002.safetensors", language())
    for _ in range(2):
        with pytest.raises(NotAModel, match="not all shards of one model"):
            network_of_weights(tmp_path, Workload())
        write(tmp_path / "m-00003-of-00003.safetensors", {"w": (2,)})


def test_a_folder_without_weights_is_none(tmp_path):
    assert network_of_weights(tmp_path, Workload()) is None
