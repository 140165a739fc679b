"""Tensors made of tensors come apart into plain ones, and together over other memory with the same class and values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from overflowml_core.errors import Unsupported
from overflowml_core.runtime.parts import (
    Kind,
    decoded_shape,
    is_known,
    is_plain,
    label,
    parameter_over,
    parts_of,
    rebuilt,
    refit,
    register_kind,
)
from tests.runtime.quantized import CONFIGS, quantized


class Packed(torch.Tensor):
    """Four bits a weight in bytes, as nothing in torch's protocol says."""

    def __new__(cls, data: torch.Tensor, scale: float = 1.0) -> Packed:
        made = torch.Tensor._make_subclass(cls, data)
        made.scale = scale
        return made


class Stranger(torch.Tensor):
    """A class that nobody knows."""


@pytest.fixture(autouse=True)
def packed_is_known() -> None:
    register_kind(
        Packed,
        Kind(
            plain=lambda t: t.detach().as_subclass(torch.Tensor),
            dressed=lambda like, plain: Packed(plain, like.scale),
            shape=lambda t: (*t.shape[:-1], t.shape[-1] * 2),
            label=lambda t: f"of {t.scale}",
        ),
    )


def weight(config: str, bias: bool = False) -> nn.Parameter:
    torch.manual_seed(1)
    return quantized(nn.Sequential(nn.Linear(32, 64, bias=bias)), config)[0].weight


def copied(tensor: torch.Tensor) -> dict[tuple[str, ...], torch.Tensor]:
    return {part.path: part.tensor.detach().clone() for part in parts_of(tensor)}


def test_a_plain_tensor_is_its_own_part() -> None:
    for tensor in (torch.ones(3), nn.Parameter(torch.ones(3))):
        (part,) = parts_of(tensor)
        assert is_plain(tensor)
        assert (part.path, label(tensor), decoded_shape(tensor)) == ((), "", (3,))
        assert part.tensor is tensor
        assert part.nbytes == 12
        other = torch.zeros(3)
        assert rebuilt(tensor, {(): other}) is other


@pytest.mark.parametrize("config", CONFIGS)
def test_quantized_weights_come_back_over_other_memory(config: str) -> None:
    original = weight(config)
    tensors = copied(original)
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    assert sum(part.nbytes for part in parts_of(original)) < 32 * 64 * 2
    assert decoded_shape(original) == (64, 32)
    twin = parameter_over(original, tensors)
    assert type(twin) is type(original)
    assert isinstance(twin, nn.Parameter)
    assert (twin.shape, twin.dtype, twin.stride(), twin.requires_grad) == (original.shape, original.dtype, original.stride(), False)
    assert all(part.tensor.data_ptr() == tensors[part.path].data_ptr() for part in parts_of(twin))
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    assert torch.equal(nn.functional.linear(x, twin), nn.functional.linear(x, original))


@pytest.mark.parametrize("config", CONFIGS)
def test_refitting_keeps_the_object_and_lets_go_of_what_it_held(config: str) -> None:
    original = weight(config)
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    expected, tensors = nn.functional.linear(x, original), copied(original)
    refit(original, {path: torch.zeros_like(tensor) for path, tensor in tensors.items()})
    assert not torch.equal(nn.functional.linear(x, original), expected)
    refit(original, tensors)
    assert all(part.tensor is tensors[part.path] for part in parts_of(original))
    assert torch.equal(nn.functional.linear(x, original), expected)


def test_nested_tensors_are_taken_apart_all_the_way_down() -> None:
    def leaf(value: float) -> torch.Tensor:
        return torch.full((2, 3), value)

    tensor = TwoTensor(TwoTensor(leaf(1), leaf(2)), TwoTensor(leaf(3), leaf(4)))
    assert is_known(tensor)
    assert [part.path for part in parts_of(tensor)] == [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    tensors = {part.path: part.tensor * 10 for part in parts_of(tensor)}
    twin = rebuilt(tensor, tensors)
    assert type(twin) is TwoTensor
    assert type(twin.b) is TwoTensor
    assert [part.tensor[0, 0].item() for part in parts_of(twin)] == [10, 20, 30, 40]
    refit(tensor, tensors)
    assert all(part.tensor is tensors[part.path] for part in parts_of(tensor))


def test_a_registered_kind_keeps_its_attributes() -> None:
    packed = Packed(torch.arange(6, dtype=torch.uint8).view(2, 3), scale=0.5)
    (part,) = parts_of(packed)
    assert type(part.tensor) is torch.Tensor
    assert part.tensor.data_ptr() == packed.data_ptr()
    assert (decoded_shape(packed), label(packed)) == ((2, 6), "Packed of 0.5")
    other = torch.zeros(2, 3, dtype=torch.uint8)
    twin = rebuilt(packed, {(): other})
    assert (type(twin), twin.scale, twin.data_ptr()) == (Packed, 0.5, other.data_ptr())
    refit(packed, {(): other})
    assert (type(packed), packed.scale, packed.data_ptr()) == (Packed, 0.5, other.data_ptr())


def test_a_parameter_made_in_inference_mode_is_a_normal_tensor() -> None:
    original = weight("int8")
    tensors = copied(original)
    with torch.inference_mode():
        assert not parameter_over(original, tensors).is_inference()


def test_a_stranger_is_refused_with_its_name_and_a_way_out() -> None:
    stranger = torch.ones(3).as_subclass(Stranger)
    assert not is_known(stranger)
    assert not is_known(TwoTensor(stranger, stranger.clone()))
    with pytest.raises(Unsupported, match=r"Stranger.*; load the model without quantization"):
        parts_of(stranger)
