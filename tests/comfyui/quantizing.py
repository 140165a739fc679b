"""Small models in files, and comfy-kitchen's own layouts in place of the host's, for tests of quantized files."""

from __future__ import annotations

import math

from flux_files import flux_shapes

from overflowml_comfyui import quantize
from overflowml_comfyui.formats import FORMATS, planned
from overflowml_comfyui.request import request_of
from overflowml_comfyui.source import describe, model_of, open_source
from overflowml_core.facts import Accelerator, HostMemory, Machine, Rates

LAYOUTS = {
    "int8": "TensorWiseINT8Layout",
    "fp8": "TensorCoreFP8Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
}
"""comfy-kitchen's own classes; the host registers further ones over them, which make the same tensors."""

GIB = 2**30
MADE_BY = "comfy-kitchen of a test"


def encoder(name, kind=None):
    """What converts into a format by the real package."""
    from comfy_kitchen.tensor import get_layout_class

    from overflowml_comfyui.encoding import Encoder

    return (kind or Encoder)(FORMATS[name], get_layout_class(LAYOUTS[name]))


def machine(card_bytes=24 * GIB):
    """A card, and RAM."""
    card = Accelerator("cuda", "a card", 0, card_bytes, card_bytes, backend="cuda")
    return Machine((card,), HostMemory(64 * GIB, 48 * GIB, 32 * GIB, 8), Rates(25e9, 25e9, 3e9), 200 * GIB)


def shapes(width=128):
    """Of a tiny Flux; the names of its norms and embeddings are the real ones."""
    return flux_shapes(width, 2, 2, 64, 32)


def save_model(path, prefix="", width=128, beside=None, metadata=None):
    """Write a tiny Flux with random weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {prefix + name: (torch.randn(shape, generator=generator) * 0.05).to(torch.bfloat16) for name, shape in shapes(width).items()}
    save_file({**weights, **(beside or {})}, str(path), metadata=metadata)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def linears():
    """What the host would say of the tiny Flux: every matrix is the weight of a linear layer."""
    return {name.removesuffix(".weight"): shape for name, shape in shapes().items() if len(shape) == 2}


def asked(*names, quality="any", is_demanded=True):
    """Formats as a node asks for them."""
    return quantize.Asked(tuple(planned(FORMATS[name], machine(), True) for name in names), quality, is_demanded)


def worked_out(path, *names, prefix="", label="diffusion_models/tiny.safetensors", **fields):
    """The layout of the file that the plan for these formats asks for, and its part."""
    source = model_of(open_source(path, label), prefix)
    request = request_of({"width": 256, "height": 256, "steps": 4, **fields})
    network, layers = describe(source, linears(), request.workload)
    wanted = asked(*names)
    part = quantize.decide("tiny", network, request, wanted, machine())
    formats = quantize.layer_formats(part, layers, wanted.formats)
    return quantize.work_out(source, part, formats, MADE_BY), part


def is_linear_in_block(name):
    """Whether a format may take this weight of the tiny Flux."""
    return "_blocks." in name and name.endswith(".weight") and len(shapes()[name]) == 2


def count(shape):
    """Elements of a shape."""
    return math.prod(shape)
