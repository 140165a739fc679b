"""Safetensors files of a Flux in the host's own names: a header, and data that is never written (a sparse file)."""

from __future__ import annotations

import json
import math
from pathlib import Path

_BYTES = {"F32": 4, "BF16": 2}


def flux_shapes(width: int = 3072, doubles: int = 19, singles: int = 38, text: int = 4096, pooled: int = 768) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a Flux; the defaults are those of FLUX.1-dev."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    for index in range(doubles):
        for stream in ("img", "txt"):
            linear(f"double_blocks.{index}.{stream}_mod.lin", 6 * width, width)
            linear(f"double_blocks.{index}.{stream}_attn.qkv", 3 * width, width)
            linear(f"double_blocks.{index}.{stream}_attn.proj", width, width)
            linear(f"double_blocks.{index}.{stream}_mlp.0", 4 * width, width)
            linear(f"double_blocks.{index}.{stream}_mlp.2", width, 4 * width)
            for norm in ("query_norm", "key_norm"):
                shapes[f"double_blocks.{index}.{stream}_attn.norm.{norm}.scale"] = (128,)
    for index in range(singles):
        linear(f"single_blocks.{index}.linear1", 7 * width, width)
        linear(f"single_blocks.{index}.linear2", width, 5 * width)
        linear(f"single_blocks.{index}.modulation.lin", 3 * width, width)
        for norm in ("query_norm", "key_norm"):
            shapes[f"single_blocks.{index}.norm.{norm}.scale"] = (128,)
    linear("img_in", width, 64)
    linear("txt_in", width, text)
    for name, columns in (("time_in", 256), ("guidance_in", 256), ("vector_in", pooled)):
        linear(f"{name}.in_layer", width, columns)
        linear(f"{name}.out_layer", width, width)
    linear("final_layer.linear", 64, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


def write_header(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> int:
    """Write a file that says it holds these weights, and return the bytes of the weights; the disk keeps none of them."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def live_flux(shapes: dict[str, tuple[int, ...]], module: str = "comfy.ldm.flux.model") -> object:
    """A module on the meta device with these weights, of a class that says it is the host's."""
    import torch
    from torch import nn

    root = type("Flux", (nn.Module,), {"__module__": module})()
    lists: dict[str, int] = {}
    for name in shapes:
        head, _, rest = name.partition(".")
        if rest.partition(".")[0].isdigit() and head.endswith("_blocks"):
            lists[head] = max(lists.get(head, 0), int(rest.partition(".")[0]) + 1)
    for head, count in lists.items():
        setattr(root, head, nn.ModuleList(nn.Module() for _ in range(count)))
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        place = root
        for step in path:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place._modules[step]
        place.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"), requires_grad=False))
    return root
