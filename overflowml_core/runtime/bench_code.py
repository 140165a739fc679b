"""What a model's own Python code costs an operation: a small block written as models of the hosts are, run on so few numbers that
nothing else takes time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_WIDTH, _HEADS, _TOKENS = 16, 2, 2


class _Norm(nn.Module):
    """RMS norm in five operations, as most language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The normalized states, of the same shape."""
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + 1e-6))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(4))

    def forward(self, hidden: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """Attention with rotated positions, of the same shape."""
        shape = (*hidden.shape[:-1], _HEADS, -1)
        query, key, value = (part(hidden).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (part * angle + _rotated(part) * angle for part in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.o_proj(mixed.transpose(1, 2).reshape(hidden.shape))


def _rotated(part: torch.Tensor) -> torch.Tensor:
    half = part.shape[-1] // 2
    return torch.cat((-part[..., half:], part[..., :half]), dim=-1)


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A gated product, of the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class TinyBlock(nn.Module):
    """A transformer block with hardly any numbers in it. ``OPERATIONS`` are those that launch a kernel; views launch none."""

    OPERATIONS = 34
    """Two norms of six, seven products, attention, two rotations of five, two of the gate and two sums; a test counts them by a trace."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.input_norm, self.attention, self.post_norm, self.feed_forward = _Norm(), _Attention(), _Norm(), _FeedForward()
        self.eval().requires_grad_(False).to(device)

    def forward(self, hidden: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """The block's output, of the same shape."""
        hidden = hidden + self.attention(self.input_norm(hidden), angle)
        return hidden + self.feed_forward(self.post_norm(hidden))

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[1, tokens, width]`` and factors of rotation, where the block is."""
        device = self.input_norm.weight.device
        return torch.ones(1, _TOKENS, _WIDTH, device=device), torch.ones(_WIDTH // _HEADS, device=device)
