"""Single files of the host (``from_single_file``): read as views of the mapped file, so that converting the names of their weights reads
none of them, and whatever is still such a view when the model is filled is left unread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from overflowml_core.errors import BadCheckpoint, NotAModel, UnsafeCheckpoint, Unsupported
from overflowml_core.inspect import checkpoint_of_files
from overflowml_core.inspect.gguf import GgufTensor, read_gguf_header
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.parts import is_plain, parts_of
from overflowml_core.runtime.structure import DTYPE_NAMES, TORCH_DTYPES
from overflowml_diffusers.defer import final_dtype, replace_parameter
from overflowml_diffusers.packed import know_packed_weights

_PLAIN_IN_GGUF = {"F32": torch.float32, "F16": torch.float16}
"""What the host takes out of a GGUF file as plain tensors (diffusers 0.42 load_gguf_checkpoint)."""


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A file mapped into memory, and where. The tensor keeps it mapped."""

    path: Path
    data: torch.Tensor

    @property
    def start(self) -> int:
        """Address of the file's first byte."""
        return int(self.data.data_ptr())


_mappings: ContextVar[list[_Mapping] | None] = ContextVar("overflowml_single_files", default=None)


class _ViewsStayViews(TorchFunctionMode):  # type: ignore[misc]
    """The host's conversions say ``torch.cat([x])`` for a copy of one chunk of a stacked weight; the chunk itself serves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what joins a single tensor."""
        if func is torch.cat and args and isinstance(args[0], (list, tuple)) and len(args[0]) == 1:
            return args[0][0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def mapping_files() -> Iterator[None]:
    """Remember the files that are mapped meanwhile, and keep views of them what they are, so that they are recognized."""
    token = _mappings.set([])
    try:
        with _ViewsStayViews():
            yield
    finally:
        _mappings.reset(token)


def check_single_file(source: Any, kwargs: dict[str, Any]) -> None:
    """Look at a local file before the host does.

    Raises:
        NotAModel: there is no such file.
        BadCheckpoint, UnsafeCheckpoint: it is broken, or it is pickle.
    """
    if not isinstance(source, (str, os.PathLike)) or str(source).startswith(("http://", "https://", "hf.co", "huggingface.co")):
        return
    path = Path(source)
    if path.is_file():
        _places_in(path)
    elif path.is_absolute() or str(source).startswith((".", "~")):
        raise NotAModel(path, "there is no such file; from_single_file takes one *.safetensors or *.gguf, or a link to one on the Hub")


def _places_in(path: Path) -> dict[str, _Place]:
    if path.suffix == ".safetensors":
        return _in_safetensors(path)
    if path.suffix == ".gguf":
        return _in_gguf(path)
    raise UnsafeCheckpoint(path, "weights of this kind may be pickle, which runs code when it is read", "get them as safetensors or GGUF")


def read_mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as the host's ``load_state_dict`` gives them, over its mapping: nothing is read yet.

    Raises:
        BadCheckpoint, UnsafeCheckpoint: it is broken, or it is pickle.
        Unsupported: it holds weights in a format that the host cannot decode.
    """
    places = _places_in(path)
    # Copy-on-write: writing to such a tensor changes no file.
    data = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    mappings = _mappings.get()
    if mappings is not None:
        mappings.append(_Mapping(path, data))
    return {name: _view(data, place) for name, place in places.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in a file: offset in bytes, dtype and shape as they are there; ``quant_type`` where it is packed."""

    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    quant_type: Any = None


def _in_safetensors(path: Path) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for name, located in checkpoint_of_files([path]).tensors.items():
        dtype = TORCH_DTYPES.get(located.entry.dtype)
        if dtype is None:
            raise Unsupported(f"{path}: {name} is of dtype {located.entry.dtype}, which cannot be read here; convert the file")
        places[name] = _Place(located.entry.offset_bytes, dtype, located.entry.shape)
    return places


def _in_gguf(path: Path) -> dict[str, _Place]:
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header = read_gguf_header(path)
    if header.big_endian:
        raise BadCheckpoint(path, "its numbers are stored with their highest byte first", "convert it again for this machine")

    def place(tensor: GgufTensor) -> _Place:
        plain = _PLAIN_IN_GGUF.get(tensor.type_name)
        if plain is not None:
            return _Place(tensor.offset_bytes, plain, tensor.shape)
        kind = getattr(GGMLQuantizationType, tensor.type_name, None)
        if kind not in SUPPORTED_GGUF_QUANT_TYPES:
            raise Unsupported(f"{path}: {tensor.name} is of type {tensor.type_name}, which diffusers cannot decode; take a file of another")
        weights, nbytes = GGML_QUANT_SIZES[kind]
        return _Place(tensor.offset_bytes, torch.uint8, (*tensor.shape[:-1], tensor.shape[-1] // weights * nbytes), kind)

    return {tensor.name: place(tensor) for tensor in header.tensors}


def _view(data: torch.Tensor, place: _Place) -> torch.Tensor:
    flat = data[place.offset_bytes : place.offset_bytes + prod(place.shape) * place.dtype.itemsize]
    # A tensor in a file need not lie on a multiple of its element size.
    flat = flat.clone() if place.offset_bytes % place.dtype.itemsize else flat
    tensor = flat.view(place.dtype).view(place.shape)
    if place.quant_type is None:
        return tensor
    from diffusers.quantizers.gguf.utils import GGUFParameter

    packed: torch.Tensor = GGUFParameter(tensor, quant_type=place.quant_type)
    return packed


def leave_unread(
    model: Any, state_dict: dict[str, torch.Tensor], dtype: torch.dtype | None, quantizer: Any, keep_in_fp32: list[str], request: Loading
) -> dict[str, torch.Tensor]:
    """Give the model parameters without data for what is still a view of a file.

    Args:
        model: on the meta device, in its final structure.
        state_dict: with the model's own names.
        dtype: that the user asked for; None leaves that of the model's own construction.
        quantizer: the host's, None where it has none. Only the one of GGUF takes weights as they are.
        keep_in_fp32: parts of names that stay in float32.
        request: notes the origins.

    Returns:
        What the host must load as always.
    """
    know_packed_weights()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        parameter, origin = parameters.get(name), _origin_of(tensor)
        if parameter is None or origin is None or not parameter.is_meta or not _taken_as_it_is(name, tensor, parameter, quantizer):
            left[name] = tensor
            continue
        if is_plain(tensor):
            data = torch.empty(tensor.shape, dtype=final_dtype(name, tensor.dtype, parameter.dtype, dtype, keep_in_fp32), device="meta")
        else:
            data = type(tensor)(torch.empty(tensor.shape, dtype=torch.uint8, device="meta"), quant_type=tensor.quant_type)
        request.defer(replace_parameter(model, name, data), origin)
    return left


def _taken_as_it_is(name: str, tensor: torch.Tensor, parameter: torch.nn.Parameter, quantizer: Any) -> bool:
    if is_plain(tensor):
        return tensor.shape == parameter.shape and (quantizer is None or hasattr(quantizer, "compute_dtype"))
    if any(part in name.split(".") for part in quantizer.modules_to_not_convert):
        return False  # the host decodes it
    quantizer.check_quantized_param_shape(name, parameter, tensor)
    return True


def _origin_of(tensor: torch.Tensor) -> Origin | None:
    parts = parts_of(tensor)
    plain = parts[0].tensor
    if len(parts) > 1 or not plain.is_contiguous() or plain.device.type != "cpu":
        return None
    for mapping in _mappings.get() or ():
        offset = plain.data_ptr() - mapping.start
        if offset >= 0 and offset + parts[0].nbytes <= mapping.data.numel():
            return Origin(mapping.path, offset, parts[0].nbytes, DTYPE_NAMES[plain.dtype], tuple(plain.shape))
    return None
