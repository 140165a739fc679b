"""Graphs in API form for the host under test."""

from __future__ import annotations

FILE = "tiny_flux.safetensors"


def sampled(optimize: dict[str, object] | None = None, seed: int = 1, name: str = "plain", size: int = 128) -> dict[str, dict]:
    """The tiny Flux sampled and saved; through an Optimize node with these fields, if any are given."""
    graph: dict[str, dict] = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": FILE, "weight_dtype": "default"}},
        "3": {"class_type": "SeededConditioning", "inputs": {"seed": 5}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["3", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": 3,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": name}},
    }
    if optimize is not None:
        sizes = {"width": size, "height": size, "frames": 0, "batch": 1, "steps": 3}
        graph["2"] = {"class_type": "OverflowMLOptimize", "inputs": {"model": ["1", 0], "budget": "", "reserve": "", **sizes, **optimize}}
        graph["5"]["inputs"]["model"] = ["2", 0]
    return graph


def previewed(budget: str, size: int = 256) -> dict[str, object]:
    """A Plan Preview node of the tiny Flux."""
    sizes = {"width": size, "height": size, "frames": 0, "batch": 1, "steps": 3}
    return {"class_type": "OverflowMLPlanPreview", "inputs": {"file": f"diffusion_models/{FILE}", "budget": budget, "reserve": "", **sizes}}
