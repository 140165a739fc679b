"""Converts one weight after the other into the host's formats, by the layout classes of comfy-kitchen. Imported where a file is made."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from overflowml_comfyui.formats import HostFormat
from overflowml_core.errors import OverflowmlError, PlanMismatch

_STRETCH_COUNT = 16 * 2**20
"""Weights that are converted at once: the layouts hold copies in float32 meanwhile."""

_PROBE = (128, 128)
_BYTE_TYPES = {"U8": torch.uint8}
_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def kitchen_version() -> str:
    """Of comfy-kitchen, for what is made by it; empty where the package does not say."""
    try:
        return version("comfy-kitchen")
    except PackageNotFoundError:
        return ""


class Encoder:
    """Makes the tensors of a format."""

    def __init__(self, one: HostFormat, layout: Any, device: torch.device | str = "cpu") -> None:
        """Convert into ``one``.

        Args:
            one: the format.
            layout: the class that makes it, the host's or comfy-kitchen's own.
            device: where it is computed.
        """
        self.format, self._layout, self._device = one, layout, torch.device(device)

    def encode(self, weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a weight by their suffixes, on the CPU, with dtypes and shapes as the format says.

        Args:
            weight: rows by columns, on the CPU; left as it is.
            name: of the weight, for messages.

        Raises:
            OverflowmlError: it holds NaN or infinity, which would spread over all of it.
            PlanMismatch: this comfy-kitchen makes other tensors.
        """
        try:
            parts = self._on(weight, name, self._device)
        except torch.OutOfMemoryError:  # the device is full of models; RAM held the weight anyway
            parts = self._on(weight, name, torch.device("cpu"))
        for part in self.format.parts:
            made = parts.get(part.suffix)
            wanted = part.shape(weight.shape[0], weight.shape[1])
            if made is None or tuple(made.shape) != wanted or _NAMES.get(made.dtype) != part.dtype:
                found = "nothing" if made is None else f"{tuple(made.shape)} of {made.dtype}"
                raise PlanMismatch(
                    f"{self.format.name}: comfy-kitchen {kitchen_version()} makes {found} for {name}{part.suffix}, "
                    f"expected {wanted} of {part.dtype}; choose another format"
                )
        return {part.suffix: parts[part.suffix] for part in self.format.parts}

    def _on(self, weight: torch.Tensor, name: str, device: torch.device) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            scale = self._scale(weight, name, device)
            stretches = [self._whole(stretch.to(device), scale) for stretch in self._stretches(weight)]
        return {part.suffix: _joined([stretch[part.suffix] for stretch in stretches], part) for part in self.format.parts}

    def _stretches(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        rows = max(_STRETCH_COUNT // weight.shape[1], 1) if self.format.in_stretches else weight.shape[0]
        yield from weight.split(rows)

    def _scale(self, weight: torch.Tensor, name: str, device: torch.device) -> torch.Tensor | str | None:
        """The scale of the whole weight by the layout's own arithmetic, which asks for its largest value alone; None for scales of rows.

        A weight of zeros has the scale 1: by 0 nothing can be divided.
        """
        largest = torch.stack([stretch.abs().amax() for stretch in weight.split(max(_STRETCH_COUNT // weight.shape[1], 1))]).amax()
        if not bool(torch.isfinite(largest)):
            raise OverflowmlError(
                f"{name}: it holds NaN or infinity, so that no scale fits it; the file is damaged: download or save it again"
            )
        if not self.format.has_one_scale:
            return None
        if not bool(largest):
            return torch.ones((), dtype=torch.float32, device=device)
        if not self.format.in_stretches:
            return "recalculate"
        return self._layout.quantize(largest.reshape(1, 1).to(device), scale="recalculate")[1].scale

    def _whole(self, weight: torch.Tensor, scale: torch.Tensor | str | None) -> dict[str, torch.Tensor]:
        asked: dict[str, object] = dict(self.format.options)
        if scale is not None:
            asked["scale"] = scale
        values, params = self._layout.quantize(weight, **asked)
        return {suffix: tensor.cpu() for suffix, tensor in self._layout.state_dict_tensors(values, params).items()}

    def fault(self) -> str:
        """Why this host or device cannot make or decode the format; empty where a small weight comes back nearly as it was."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(*_PROBE, generator=generator).to(torch.bfloat16)
        try:
            self.encode(weight, "a test weight")
            values, params = self._layout.quantize(weight.to(self._device), **self._asked())
            back = self._layout.dequantize(values, params).cpu().float()
        except Exception as error:  # noqa: BLE001 -- whatever a kernel that is not there raises
            return " ".join(str(error).split()) or type(error).__name__
        lost = float((back - weight.float()).square().mean().sqrt())
        return "" if lost < 3 * self.format.relative_error else f"a test weight comes back with an error of {lost:.3f}"

    def _asked(self) -> dict[str, object]:
        return {**self.format.options, **({"scale": "recalculate"} if self.format.has_one_scale else {})}


def _joined(pieces: list[torch.Tensor], part: Any) -> torch.Tensor:
    joined = pieces[0] if len(pieces) == 1 or not part.size.rows else torch.cat(pieces)
    joined = joined.contiguous()
    wanted = _BYTE_TYPES.get(part.dtype)
    return joined.view(wanted) if wanted is not None and joined.dtype is not wanted and joined.element_size() == 1 else joined
