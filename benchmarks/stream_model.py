"""Makes a folder with a Llama of random bfloat16 weights, shard by shard, so that a model larger than the memory can be made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SHARD_BYTES = 2 * 10**9
READY = "READY"
"""Name of the file that is written last: a folder without it is half made."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. The default has 6.6 GB of weights."""

    hidden: int = 3072
    intermediate: int = 8192
    layers: int = 31
    heads: int = 24
    kv_heads: int = 8
    vocabulary: int = 32000

    def config(self) -> dict[str, object]:
        """As transformers' config.json has it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which a pass needs them; what belongs to one layer has its name in common."""
        kv_width = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (kv_width, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv_width, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)


def make_model(folder: Path, shape: Shape = Shape(), shard_bytes: int = SHARD_BYTES) -> int:
    """Write the model; one shard at a time is in memory. Returns the bytes of its weights.

    Args:
        folder: made where it is missing; files of the same names are written over.
        shape: of the model.
        shard_bytes: most weights in one file.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    groups = _shards(shape, shard_bytes)
    where: dict[str, str] = {}
    total_bytes = 0
    generator = torch.Generator().manual_seed(0)
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _random(size, generator) for name, size in group}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / READY).write_text(str(total_bytes), encoding="ascii")
    return total_bytes


def _shards(shape: Shape, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The weights in groups of at most so many bytes, or of one weight."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = []
    room_bytes = 0
    for name, size in shape.weights():
        nbytes = 2 * torch.Size(size).numel()
        if not groups or nbytes > room_bytes:
            groups.append([])
            room_bytes = shard_bytes
        groups[-1].append((name, size))
        room_bytes -= nbytes
    return groups


def _random(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def weight_files(folder: Path) -> list[Path]:
    """The shards, in order.

    Raises:
        SystemExit: there is none.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise SystemExit(f"{folder}: no .safetensors file in it; give a folder that holds a model, or leave --model out to have one made")
    return found
