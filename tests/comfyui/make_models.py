"""Runs in the host's interpreter: writes a tiny random Flux of the host's own class into a folder of diffusion models."""

from __future__ import annotations

import sys
from pathlib import Path

sys.argv, folder = [sys.argv[0], "--cpu"], Path(sys.argv[1])

import comfy.options  # noqa: E402 -- the host reads the command line when it is imported

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SHAPE = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    model = Flux(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **SHAPE)
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(w.shape, generator=generator) * 0.05 for name, w in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(folder / "tiny_flux.safetensors"))


main()
