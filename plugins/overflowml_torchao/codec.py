"""Converts weights as torchao's own ``quantize_`` does, one at a time and in stretches of rows. Imported where a plan is carried out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
import torchao
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from overflowml_core.codec import Kernel
from overflowml_core.formats import Format
from overflowml_core.runtime.parts import parts_of, rebuilt

_log = logging.getLogger("overflowml")

_STRETCH_COUNT = 4 * 2**20
"""Weights that are converted at once: torchao holds several copies in float32 meanwhile, 32 bytes a weight at most."""

# The inductor settings that torchao would change are the process's, and so is the precision of float32 products that comes with them.
_CONFIGS: dict[str, Callable[[], AOBaseConfig]] = {
    "int8": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
    "fp8": lambda: Float8WeightOnlyConfig(set_inductor_config=False),
}
"""Weight-only schemes with a scale for each row, so that rows can be converted by themselves."""

_PROBE = (48, 80)


class TorchaoCodec:
    """Converts weights into one of torchao's formats. See :class:`overflowml_core.codec.Codec`."""

    def __init__(self, format: Format) -> None:
        """Make a codec for a format that ``_CONFIGS`` knows."""
        self.format = format
        self.version = f"torchao-{torchao.__version__}"

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the format: what ``quantize_`` makes of a linear layer that holds it, bit for bit.

        Args:
            weight: rows by columns.
        """
        rows = max(_STRETCH_COUNT // max(weight.shape[1], 1), 1)
        if weight.shape[0] <= rows or weight.is_meta:
            return self._whole(weight)
        stretches = [{p.path: p.tensor for p in parts_of(self._whole(stretch))} for stretch in weight.split(rows)]
        joined = {path: torch.cat([stretch[path] for stretch in stretches]) for path in stretches[0]}
        return rebuilt(self.template(weight.shape[0], weight.shape[1], weight.dtype), joined)

    def template(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """What becomes of a weight of this shape and dtype, without data."""
        return self._whole(torch.empty(rows, columns, dtype=dtype, device="meta"))

    def _whole(self, weight: torch.Tensor) -> torch.Tensor:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(nn.Sequential(linear), _CONFIGS[self.format.name]())
        return linear.weight.data

    def decode(self, parts: Mapping[tuple[str, ...], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """A weight from its parts, as torchao's ``dequantize`` has it bit for bit, in a tenth of the time that it takes."""
        values = parts["qdata",]
        if values.is_floating_point():
            values = values.to(torch.float32)
        return torch.mul(values, parts["scale",]).to(dtype)

    def kernel(self, device_type: str, dtype: torch.dtype) -> Kernel | None:
        """torch's product with INT8 weights on processors, which is fast in bfloat16 alone (torch 2.13, one token: seven times as fast as
        decoding, in float32 half as fast). On accelerators decoding a matrix is little beside having it brought in."""
        if self.format.name != "int8" or device_type != "cpu" or dtype is not torch.bfloat16:
            return None
        return _INT8 if _int8_works() else None

    def works(self) -> bool:
        """Whether this torchao makes the parts that the planner was told of, of values as of none, and multiplies with them."""
        rows, columns = _PROBE
        made = self.encode(torch.ones(rows, columns, dtype=torch.bfloat16))
        wanted = [part.nbytes(rows, columns) for part in self.format.parts]
        if any([part.nbytes for part in parts_of(like)] != wanted for like in (made, self.template(rows, columns, torch.bfloat16))):
            return False
        product = nn.functional.linear(torch.ones(1, columns, dtype=torch.bfloat16), made)
        return bool((product == columns).all())


def _multiply_int8(x: torch.Tensor, parts: Mapping[tuple[str, ...], torch.Tensor]) -> torch.Tensor:
    return torch._weight_int8pack_mm(x.contiguous(), parts["qdata",], parts["scale",].view(-1).to(x.dtype))


_INT8 = Kernel("torch._weight_int8pack_mm", _multiply_int8)


@lru_cache(maxsize=1)
def _int8_works() -> bool:
    """Whether this torch has the kernel under its private name, and it multiplies as it should."""
    rows, columns = _PROBE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, columns, generator=generator).to(torch.bfloat16)
    values = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, 1, generator=generator) + 0.5
    try:
        found = _multiply_int8(x, {("qdata",): values, ("scale",): scales})
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        _log.info("experts in int8 are decoded for each product: torch._weight_int8pack_mm cannot be used here (%s)", error)
        return False
    expected = x.float() @ (values * scales).t()
    is_right = bool(((found.float() - expected).norm() <= 0.02 * expected.norm()).item())
    if not is_right:
        _log.warning("experts in int8 are decoded for each product: torch._weight_int8pack_mm gives wrong results here")
    return is_right


@lru_cache(maxsize=8)
def codec_of(format: Format) -> TorchaoCodec | None:
    """The codec of a format; None where torchao has none, or not as the planner knows it. Tried once."""
    if format.name not in _CONFIGS:
        return None
    codec = TorchaoCodec(format)
    return codec if codec.works() else None
