"""The file that a model is quantized from: its header, the model's tensors in it, and what tells it from any other. Reads no weight."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from overflowml_core.errors import BadCheckpoint, NotAModel, UnsafeCheckpoint, Unsupported
from overflowml_core.facts import Linear, Network, TensorFact, Workload, network_fingerprint
from overflowml_core.inspect.ggml_types import PLAIN_TYPES
from overflowml_core.inspect.image_shapes import image_component
from overflowml_core.inspect.safetensors import Header, TensorEntry, read_header
from overflowml_core.inspect.tensor_groups import ComponentName, find_groups

SUFFIXES = (".safetensors", ".sft")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_QUANTIZED_LEAVES = frozenset(
    {"comfy_quant", "scaled_fp8", "weight_scale", "weight_scale_2", "scale_weight", "input_scale", "scale_input", "absmax", "qweight"}
)
"""Last parts of names that only quantized weights come with: the host's, scaled FP8's, bitsandbytes' and GPTQ's."""

_SAMPLING_KEYS = frozenset({"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"})
"""Tensors beside the model in a checkpoint by which the host knows how to sample it (ComfyUI 0.33, ``supported_models.py``)."""

_LOAD_AS_IT_IS = "load it with ComfyUI's own loader, or choose the file that it was made from"


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a file from what it was before: size in bytes, and times of the last change of content and of anything, in nanoseconds.

    Programs can set the second back and no program can set the third.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Of a file as it is now.

        Raises:
            OSError: it is not there.
        """
        state = os.stat(path)
        return cls(state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Source:
    """A file with a model in it.

    Attributes:
        label: what users chose it by: the kind of folder and the file's name in it.
        path: where it is.
        stamp: of the file when its header was read.
        header: of the whole file.
        tensors: of the model, by their names inside it, in the order in which their bytes lie.
    """

    label: str
    path: Path
    stamp: Stamp
    header: Header
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer whose weight may be quantized: its name inside the model, and its weight's rows, columns and dtype."""

    name: str
    rows: int
    columns: int
    dtype: str


def check_kind(path: Path) -> None:
    """Refuse files that are not read here by their names; nothing is opened.

    Raises:
        UnsafeCheckpoint: a pickle.
        Unsupported: GGUF, which is quantized already.
        NotAModel: anything else but safetensors.
    """
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise UnsafeCheckpoint(path.name, "it is a pickle, which may run code when it is read", "convert it to safetensors first")
    if suffix == ".gguf":
        raise Unsupported(f"{path.name}: GGUF is quantized already; give the safetensors file that it was made from")
    if suffix not in SUFFIXES:
        raise NotAModel(path.name, "choose a .safetensors file")


def open_source(path: Path, label: str) -> Source:
    """Read a file's header; all of its tensors count as the model's.

    Raises:
        BadCheckpoint: it is missing or damaged.
        OverflowmlError: it is of a kind that is not read here.
    """
    check_kind(path)
    try:
        stamp = Stamp.of(path)
    except OSError as error:
        raise BadCheckpoint(path, f"it cannot be read ({error})", "correct the path or its permissions") from None
    header = read_header(path)
    return Source(label, path, stamp, header, {entry.name: entry for entry in header.tensors})


def model_of(source: Source, prefix: str) -> Source:
    """The diffusion model in a file, under the names that its tensors have without the prefix.

    Args:
        source: the whole file.
        prefix: of the names of the model's tensors; where none begins with it, the file holds a model alone.

    Raises:
        Unsupported: its weights are quantized already.
        NotAModel: it has no weights.
    """
    inner = {name.removeprefix(prefix): entry for name, entry in source.tensors.items() if prefix and name.startswith(prefix)}
    if inner:
        inner |= {name: entry for name, entry in source.tensors.items() if name in _SAMPLING_KEYS}
    else:
        inner = dict(source.tensors)
    _refuse_quantized(source, inner)
    if not any(entry.nbytes for entry in inner.values()):
        raise NotAModel(source.path.name, "it holds no weights; give the file of a model")
    return replace(source, tensors=inner)


def _refuse_quantized(source: Source, tensors: Mapping[str, TensorEntry]) -> None:
    odd = next((name for name in tensors if name.rpartition(".")[2] in _QUANTIZED_LEAVES), None)
    odd = odd or next((e.name for e in tensors.values() if len(e.shape) == 2 and e.dtype not in PLAIN_TYPES and min(e.shape) > 1), None)
    if odd is None and "_quantization_metadata" in source.header.metadata:
        odd = "_quantization_metadata"
    if odd is not None:
        raise Unsupported(f"{source.path.name}: its weights are quantized already (it holds {odd!a}); {_LOAD_AS_IT_IS}")


def describe(source: Source, linears: Mapping[str, tuple[int, int]], workload: Workload) -> tuple[Network, dict[str, tuple[Layer, ...]]]:
    """The model as the planner sees it, with the layers that formats may convert: those in blocks, by the block's name.

    Norms, embeddings, heads and the first and last layers are outside the blocks, and stay as they are.

    Args:
        source: the model's file.
        linears: rows and columns of every linear layer that the host could run in a format, by its name inside the model.
        workload: what it will be asked to do.
    """
    facts = [TensorFact(name, entry.shape, entry.dtype, entry.nbytes) for name, entry in source.tensors.items()]
    component = image_component(ComponentName("model", ""), facts, workload)
    layers = {group.name: tuple(_layers(group.tensors, linears)) for group in find_groups(facts)[0]}
    blocks = []
    for block in component.blocks:
        counts = Counter((layer.rows, layer.columns, layer.dtype) for layer in layers[block.name])
        alike = tuple(Linear(*shape, count) for shape, count in sorted(counts.items()))
        blocks.append(replace(block, linears=alike, linear_count=sum(one.rows * one.columns * one.count for one in alike)))
    component = replace(component, blocks=tuple(blocks))
    name = component.class_name or "an unknown model"
    return Network((component,), str(source.path), name, network_fingerprint((component,))), layers


def _layers(tensors: tuple[TensorFact, ...], linears: Mapping[str, tuple[int, int]]) -> list[Layer]:
    found = []
    for tensor in tensors:
        name, _, leaf = tensor.name.rpartition(".")
        if leaf == "weight" and tensor.shape == linears.get(name):
            found.append(Layer(name, tensor.shape[0], tensor.shape[1], tensor.dtype))
    return found
