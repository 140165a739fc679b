"""Tensors that are made of other tensors, as quantizers make them: taken apart into plain ones, and put together over other memory.

Knows torch's own protocol (``__tensor_flatten__``) and whatever kinds are registered; no quantizer by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import Unsupported

Path = tuple[str, ...]
"""Names of attributes that lead from a tensor to a plain one inside it; empty for a tensor that is plain itself."""


@dataclass(frozen=True, slots=True)
class Part:
    """A plain tensor and where it is in the one that it was taken from."""

    path: Path
    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return int(self.tensor.numel() * self.tensor.element_size())


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of tensors that hold their elements themselves and say by attributes what these mean, outside torch's protocol.

    Attributes:
        plain: its elements as a plain tensor over the same memory.
        dressed: an object of the class over a plain tensor, with the attributes of another one (given first).
        shape: of the weights that its elements stand for.
        label: what tells it from others of its class whose elements look alike.
    """

    plain: Callable[[Any], torch.Tensor]
    dressed: Callable[[Any, torch.Tensor], torch.Tensor]
    shape: Callable[[Any], tuple[int, ...]]
    label: Callable[[Any], str]


_kinds: dict[type, Kind] = {}


def register_kind(cls: type, kind: Kind) -> None:
    """Have tensors of exactly this class taken apart and put together by these rules. A second call replaces the first."""
    _kinds[cls] = kind


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is torch's own, or a parameter over one."""
    return type(tensor) is torch.Tensor or (type(tensor) is nn.Parameter and type(tensor.data) is torch.Tensor)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether :func:`parts_of` can take a tensor apart, all the way down."""
    if is_plain(tensor) or type(tensor) in _kinds:
        return True
    names = _inner_names(tensor)
    return bool(names) and all(is_known(getattr(tensor, name)) for name in names)


def parts_of(tensor: torch.Tensor) -> tuple[Part, ...]:
    """The plain tensors that a tensor is made of, in the order in which its class names them; a plain one is its own only part.

    Raises:
        Unsupported: a class in it neither follows torch's protocol nor is registered.
    """
    if is_plain(tensor):
        return (Part((), tensor),)
    kind = _kinds.get(type(tensor))
    if kind is not None:
        return (Part((), kind.plain(tensor)),)
    names = _inner_names(tensor)
    if not names:
        raise Unsupported(
            f"a {type(tensor).__name__}, which overflowml cannot take apart; load the model without quantization, or quantized by torchao"
        )
    return tuple(Part((name, *part.path), part.tensor) for name in names for part in parts_of(getattr(tensor, name)))


def rebuilt(like: torch.Tensor, tensors: Mapping[Path, torch.Tensor]) -> torch.Tensor:
    """A tensor of the same class, size and meaning over other plain tensors.

    Args:
        like: what to be like; it is only read, and may be on another device.
        tensors: for each part of it, a plain tensor of the same shape and dtype, by its path.

    Raises:
        Unsupported: as for :func:`parts_of`.
    """
    if is_plain(like):
        return tensors[()]
    kind = _kinds.get(type(like))
    if kind is not None:
        return kind.dressed(like, tensors[()])
    inner = {name: rebuilt(getattr(like, name), _below(name, tensors)) for name in _inner_names(like)}
    _, context = like.__tensor_flatten__()  # type: ignore[attr-defined]
    made: torch.Tensor = type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())  # type: ignore[attr-defined]
    return made


def parameter_over(like: nn.Parameter, tensors: Mapping[Path, torch.Tensor]) -> nn.Parameter:
    """The same as a parameter, which requires a gradient as the other one does.

    Raises:
        Unsupported: as for :func:`parts_of`.
    """
    # Outside inference mode, whatever the caller is in: inference tensors could not be used under autograd later.
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(rebuilt(like, tensors), requires_grad=like.requires_grad)


def refit(tensor: torch.Tensor, tensors: Mapping[Path, torch.Tensor]) -> None:
    """Have a tensor hold other plain tensors from now on: it stays the object that it is and lets go of those that it held.

    Args:
        tensor: changed in place.
        tensors: as for :func:`rebuilt`, on the device on which the tensor says it is.
    """
    if is_plain(tensor) or type(tensor) in _kinds:
        tensor.data = tensors[()]
        return
    for name in _inner_names(tensor):
        inner, below = getattr(tensor, name), _below(name, tensors)
        if is_plain(inner):
            setattr(tensor, name, below[()])
        else:
            refit(inner, below)


def decoded_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the weights that a tensor stands for: of what it decodes to, where it is packed."""
    kind = _kinds.get(type(tensor))
    return tuple(kind.shape(tensor) if kind is not None else tensor.shape)


def label(tensor: torch.Tensor) -> str:
    """What kind of tensor this is, for fingerprints and messages; empty for a plain one."""
    if is_plain(tensor):
        return ""
    kind = _kinds.get(type(tensor))
    return f"{type(tensor).__name__} {kind.label(tensor)}" if kind is not None else type(tensor).__name__


def _inner_names(tensor: torch.Tensor) -> tuple[str, ...]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return tuple(flatten()[0]) if flatten is not None and hasattr(type(tensor), "__tensor_unflatten__") else ()


def _below(name: str, tensors: Mapping[Path, torch.Tensor]) -> dict[Path, torch.Tensor]:
    return {path[1:]: tensor for path, tensor in tensors.items() if path[:1] == (name,)}
