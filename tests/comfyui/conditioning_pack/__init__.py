"""A pack for the host under test: text conditioning from a seed, so that no text encoder is needed."""

from __future__ import annotations

import torch


class SeededConditioning:
    """Random embeddings with the shapes that the tiny Flux takes."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """One seed."""
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        """The conditioning."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 8, 32, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, 16, generator=generator), "guidance": 3.5}]],)


NODE_CLASS_MAPPINGS = {"SeededConditioning": SeededConditioning}
