"""Runs in the host's interpreter: writes tiny random models of the host's own classes into its folders.

Two Fluxes and a LoRA for them, and a checkpoint: an SD3 whose CLIP-L has its full size, for the host makes no smaller one. What of that is
two-dimensional is zeros, which the disk does not keep.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.argv, folder = [sys.argv[0], "--cpu"], Path(sys.argv[1])

import comfy.options  # noqa: E402 -- the host reads the command line when it is imported

comfy.options.enable_args_parsing()

import comfy.clip_model  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
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
_CLIP = Path(comfy.clip_model.__file__).parent / "sd1_clip_config.json"


def drawn(model: torch.nn.Module, seed: int, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """Random weights for a model."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=generator) * scale for name, weight in model.state_dict().items()}


def low_rank(weights: dict[str, torch.Tensor], rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA of every linear layer in blocks."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, weight in weights.items():
        if "_blocks." in name and weight.dim() == 2:
            place = f"diffusion_model.{name.removesuffix('.weight')}"
            made[f"{place}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            made[f"{place}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
    return made


def write_sparse(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file; tensors on the meta device are zeros that the disk does not keep."""
    kept = sorted(tensors, key=lambda name: tensors[name].is_meta)
    header, offset = {}, 0
    for name in kept:
        end = offset + tensors[name].numel() * tensors[name].element_size()
        kind = {torch.float32: "F32", torch.float16: "F16"}[tensors[name].dtype]
        header[name], offset = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in kept:
            if not tensors[name].is_meta:
                file.write(tensors[name].contiguous().numpy().tobytes())
        file.truncate(8 + len(text) + offset)


def checkpoint() -> dict[str, torch.Tensor]:
    """The weights of the SD3, its CLIP-L and a small VAE, under a checkpoint's names."""
    operations = comfy.ops.disable_weight_init
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    shape = {"input_size": None, "in_channels": 16, "depth": 2, "adm_in_channels": 2048, "context_embedder_config": context}
    model = MMDiT(**shape, num_patches=32 * 32, pos_embed_max_size=32, dtype=torch.float32, device="cpu", operations=operations)
    clip = comfy.clip_model.CLIPTextModel(json.loads(_CLIP.read_text()), dtype=torch.float16, device="meta", operations=operations)
    text = {name: weight if weight.dim() > 1 else torch.randn(weight.shape).half() for name, weight in clip.state_dict().items()}
    return {
        **{f"model.diffusion_model.{name}": weight for name, weight in drawn(model, 4).items()},
        **{f"text_encoders.clip_l.transformer.{name}": weight for name, weight in text.items()},
        **{f"first_stage_model.{name}": weight for name, weight in drawn(TAESD(latent_channels=16), 5).items() if "vae_" not in name},
    }


def main() -> None:
    """Write the files."""
    torch.manual_seed(0)
    model = Flux(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **SHAPE)
    for kind in ("diffusion_models", "loras", "checkpoints"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    weights = drawn(model, 1)
    save_file(weights, str(folder / "diffusion_models" / "tiny_flux.safetensors"))
    save_file(drawn(model, 2), str(folder / "diffusion_models" / "other_flux.safetensors"))
    save_file(low_rank(weights), str(folder / "loras" / "tiny_lora.safetensors"))
    write_sparse(folder / "checkpoints" / "tiny_checkpoint.safetensors", checkpoint())


main()
