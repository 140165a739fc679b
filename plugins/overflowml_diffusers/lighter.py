"""A VAE that takes less memory in its calls, step by step: slices of a batch, tiles of a picture, smaller tiles. Knows no plan."""

from __future__ import annotations

from typing import Any

import torch

from overflowml_diffusers.variants import SLICING, SWITCHES, TILING, switches_of

_SIDES = (
    "tile_sample_min_size",
    "tile_sample_min_height",
    "tile_sample_min_width",
    "tile_sample_stride_height",
    "tile_sample_stride_width",
    "tile_latent_min_size",
    "tile_latent_min_height",
    "tile_latent_min_width",
)
"""Attributes of diffusers' VAEs that hold a side of a tile or the way from one to the next, in pixels or in latents."""
_LEAST_LATENTS = 8
"""Side of the smallest tile: seams are a quarter of it, and below that there is little but seams."""


class VaeLighter:
    """The steps of one VAE. See :class:`overflowml_core.runtime.lighter.Lighten`.

    Note [blending]. Tiles overlap and are blended where they do, and a tile does not see what is beyond it: pictures differ a little from
    those that were decoded whole. Slices of a batch are what a picture by itself gives.

    Args:
        module: a VAE of diffusers.
        may_tile: pictures may differ as tiles do; else the batch alone is sliced.
    """

    def __init__(self, module: Any, may_tile: bool) -> None:
        self._module, self._may_tile = module, may_tile
        self._before: dict[str, Any] = {}
        """By attribute what it was before the first step that changed it."""

    def step(self, values: tuple[Any, ...]) -> str:
        """The next step that makes a difference for this call."""
        module, able = self._module, switches_of(self._module)
        batch = next((int(value.shape[0]) for value in values if isinstance(value, torch.Tensor) and value.dim()), 1)
        if batch > 1 and SLICING in able and not module.use_slicing:
            self._set(SWITCHES[SLICING], True)
            return "a batch is computed one by one from now on, which gives what each one alone does"
        if not self._may_tile or TILING not in able:
            return ""
        if not module.use_tiling:
            self._set(SWITCHES[TILING], True)
        elif not self._halve():
            return ""
        return f"in tiles of {self._side()} pixels from now on, not identical to the whole: their seams are blended"

    def _halve(self) -> bool:
        sides = {name: getattr(self._module, name) for name in _SIDES if isinstance(getattr(self._module, name, None), int)}
        if not sides or any(value % 2 for value in sides.values()) or self._latents(sides) // 2 < _LEAST_LATENTS:
            return False
        for name, value in sides.items():
            self._set(name, value // 2)
        return True

    def _latents(self, sides: dict[str, int]) -> int:
        latents = [value for name, value in sides.items() if "latent" in name]
        if latents:
            return min(latents)
        factor = int(getattr(self._module, "spatial_compression_ratio", 8))
        return min((value for name, value in sides.items() if "stride" not in name), default=0) // factor

    def _side(self) -> str:
        found = [getattr(self._module, name) for name in _SIDES[:3] if isinstance(getattr(self._module, name, None), int)]
        return " x ".join(map(str, found)) or "some"

    def _set(self, name: str, value: object) -> None:
        self._before.setdefault(name, getattr(self._module, name))
        setattr(self._module, name, value)

    def undo(self) -> None:
        """All attributes as they were."""
        for name, value in self._before.items():
            setattr(self._module, name, value)
        self._before.clear()
