"""What the ram part runs: a transformer as large as FLUX.1-dev's and layers of Llama-70B, with random weights and one call's inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
SMALL_FLUX = {
    **FLUX,
    "num_layers": 1,
    "num_single_layers": 3,
    "num_attention_heads": 1,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
}
LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SMALL_LLAMA = {
    **LLAMA_70B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 100,
}


@dataclass(frozen=True)
class Subject:
    """A model in RAM and what it is called with.

    Attributes:
        name: in figures; empty for the one whose figures need no name.
        model: holds the weights; it is never run itself.
        arguments: of one call, on the device.
        result: takes the tensor to compare out of what a call returns.
    """

    name: str
    model: nn.Module
    arguments: dict[str, Any]
    result: Callable[[Any], torch.Tensor]

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def shell(self) -> nn.Module:
        """A model of its own that shares the weights' memory: what a side does to its modules dies with it."""
        memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.model.parameters()}
        return copy.deepcopy(self.model, memo).eval()


def flux(device: torch.device, edge: int, small: bool) -> Subject:
    """One denoising step of an image of this edge in pixels."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    config = SMALL_FLUX if small else FLUX
    with init_empty_weights():
        model = FluxTransformer2DModel.from_config(config)
    fill(model, device)
    tokens = (edge // 16) ** 2
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    arguments = {
        "hidden_states": random(1, tokens, config["in_channels"]),
        "encoder_hidden_states": random(1, 64 if small else 512, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "timestep": torch.ones(1, device=device, dtype=torch.bfloat16),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(64 if small else 512, 3, device=device),
        "guidance": torch.full((1,), 3.5, device=device),
        "return_dict": False,
    }
    return Subject("", model, arguments, lambda output: output[0])


def llama(device: torch.device, room_bytes: int, small: bool, prompt_tokens: int = 2048) -> Subject:
    """A prefill of so many tokens by as many of Llama-70B's layers as the room holds."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dict(SMALL_LLAMA if small else LLAMA_70B)
    config["num_hidden_layers"] = min(config["num_hidden_layers"], layers_in(room_bytes, config))
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    fill(model, device)
    tokens = torch.arange(prompt_tokens if not small else 16, device=device)[None] % config["vocab_size"]
    arguments = {"input_ids": tokens, "use_cache": False, "logits_to_keep": 1}
    return Subject("llama.", model, arguments, lambda output: output.logits)


def layers_in(room_bytes: int, config: dict[str, Any]) -> int:
    """So many layers of a Llama fit, at least two."""
    hidden, kv_share = config["hidden_size"], config["num_key_value_heads"] / config["num_attention_heads"]
    layer_bytes = 2 * hidden * (hidden * (2 + 2 * kv_share) + 3 * config["intermediate_size"])
    return max(2, int((room_bytes - 2 * 2 * hidden * config["vocab_size"]) / layer_bytes))


def fill(model: nn.Module, device: torch.device) -> None:
    """Give a model without weights seeded random ones, in bfloat16 on the CPU."""
    drawn_on = device if device.type == "cuda" else torch.device("cpu")  # 12 billion numbers take minutes on a CPU
    generator = torch.Generator(drawn_on).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                values = torch.randn(parameter.shape, generator=generator, device=drawn_on, dtype=torch.bfloat16) * 0.02
                module._parameters[name] = nn.Parameter(values.cpu(), requires_grad=False)
    model.eval()
