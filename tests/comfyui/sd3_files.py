"""A tiny SD3 in the format that ComfyUI and diffusers both load: its weights are zeros, which the disk does not keep."""

from __future__ import annotations

import json
from pathlib import Path

from flux_files import write_header

from overflowml_core.facts import Accelerator, HostMemory, Limits, Machine, Rates, Workload

GIB = 2**30
BUDGETS = ("27MB", "29MB")
"""Of these the first streams both blocks and the second keeps them."""


def sd3_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights: two blocks of width 128, the second without what follows the last block."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 1024, 128),
        "x_embedder.proj.weight": (128, 16, 2, 2),
        "x_embedder.proj.bias": (128,),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("context_embedder", 128, 4096)
    linear("final_layer.linear", 64, 128)
    linear("final_layer.adaLN_modulation.1", 256, 128)
    for name, columns in (("t_embedder", 256), ("y_embedder", 2048)):
        linear(f"{name}.mlp.0", 128, columns)
        linear(f"{name}.mlp.2", 128, 128)
    for index, stream in ((0, "x_block"), (0, "context_block"), (1, "x_block"), (1, "context_block")):
        block, is_last = f"joint_blocks.{index}.{stream}", (index, stream) == (1, "context_block")
        linear(f"{block}.attn.qkv", 384, 128)
        linear(f"{block}.adaLN_modulation.1", 256 if is_last else 768, 128)
        if not is_last:
            linear(f"{block}.attn.proj", 128, 128)
            linear(f"{block}.mlp.fc1", 512, 128)
            linear(f"{block}.mlp.fc2", 128, 512)
    return shapes


def write_sd3(folder: Path) -> Path:
    """The file, and beside it the configuration that diffusers wants: in ``transformer/config.json``."""
    path = folder / "tiny_sd3.safetensors"
    write_header(path, sd3_shapes(), "F32")
    config = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 64,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 32,
    }
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return path


def asked(budget: str) -> tuple[Limits, Workload]:
    """The request: activations are given, for a host that traces a model and one that reckons by shapes do not agree on them."""
    return Limits(device_memory=budget, reserve="20MB", quality="lossless"), Workload(height=64, width=64, steps=2)


def machine() -> Machine:
    """The machine."""
    card = Accelerator("cuda", "a card", 0, 24 * GIB, 24 * GIB, backend="cuda")
    return Machine((card,), HostMemory(64 * GIB, 48 * GIB, 32 * GIB, 8), Rates(25e9, 25e9, 3e9), 200 * GIB)
