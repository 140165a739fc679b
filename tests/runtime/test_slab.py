"""Slabs: what goes in comes out, with shape, strides and dtype; casts are torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.errors import PlanMismatch, Unsupported
from overflowml_core.facts import Limits
from overflowml_core.layout import SLAB_ALIGNMENT_BYTES
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import lay_out
from overflowml_core.runtime.source import fill
from overflowml_core.runtime.structure import TORCH_DTYPES, dissect
from tests.runtime.build import on_meta, origins, raw, save


def holder(*tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_parameter(f"w{i}", nn.Parameter(tensor, requires_grad=False))
    return module


def bring(module: nn.Module, loading: Loading | None = None) -> list[torch.Tensor]:
    """The module's weights, read through a slab."""
    slab = lay_out(dissect(module).fixed, loading)
    buffer = torch.full((slab.nbytes,), 0xAB, dtype=torch.uint8)
    with FileReader() as reader:
        fill(slab.entries, buffer, reader)
    return [entry.view(buffer) for entry in slab.entries]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    generator = torch.Generator().manual_seed(nbytes + len(shape))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


SHAPES = [(), (1,), (0,), (3, 0), (0, 3), (7,), (3, 5), (2, 3, 5), (1, 1, 1, 1), (257,)]


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES.values()), ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = [random(shape, dtype) for shape in SHAPES]
    module = nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_parameter(f"w{i}", nn.Parameter(tensor, requires_grad=False))
    for tensor, found in zip(tensors, bring(module), strict=True):
        assert (found.dtype, found.shape, raw(found)) == (tensor.dtype, tensor.shape, raw(tensor))


def test_dense_strides_are_kept() -> None:
    conv = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    video = torch.randn(2, 3, 2, 4, 4).to(memory_format=torch.channels_last_3d)
    turned = torch.randn(6, 4).t()
    for tensor, found in zip([conv, video, turned], bring(holder(conv, video, turned)), strict=True):
        assert found.stride() == tensor.stride()
        assert torch.equal(found, tensor)


def test_tensors_with_gaps_or_repeats_become_contiguous() -> None:
    sliced, expanded = torch.randn(6, 8)[:, ::2], torch.randn(1, 4).expand(3, 4)
    for tensor, found in zip([sliced, expanded], bring(holder(sliced, expanded)), strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, tensor)


def test_weights_start_on_aligned_bytes_and_do_not_overlap() -> None:
    module = holder(torch.ones(1, dtype=torch.uint8), torch.ones(300, dtype=torch.uint8), torch.ones(0), torch.tensor(1.0))
    slab = lay_out(dissect(module).fixed, None)
    assert [e.offset_bytes for e in slab.entries] == [0, 512, 1024, 1024]
    assert slab.nbytes == 1536
    assert all(e.offset_bytes % SLAB_ALIGNMENT_BYTES == 0 for e in slab.entries)


def test_a_unit_without_weights_is_an_empty_slab() -> None:
    slab = lay_out(dissect(nn.Module()).fixed, None)
    assert (slab.nbytes, slab.entries, slab.parameters(torch.empty(0, dtype=torch.uint8))) == (0, (), ())


def test_parameters_over_a_slab_are_normal_tensors_even_in_inference_mode() -> None:
    slab = lay_out(dissect(holder(torch.randn(4))).fixed, None)
    buffer = torch.zeros(slab.nbytes, dtype=torch.uint8)
    with torch.inference_mode():
        (parameter,) = slab.parameters(buffer)
    assert not parameter.is_inference()
    assert not parameter.requires_grad
    assert type(parameter) is nn.Parameter


def test_install_reaches_every_place_that_holds_a_weight() -> None:
    module = nn.Module()
    module.a, module.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    module.b.weight = module.a.weight
    slab = lay_out(dissect(module).fixed, None)
    (parameter,) = slab.parameters(torch.zeros(slab.nbytes, dtype=torch.uint8))
    slab.install((parameter,))
    assert module.a.weight is parameter
    assert module.b.weight is parameter


# ---- from files


@pytest.mark.parametrize("dtype", [d for d in TORCH_DTYPES.values() if d is not torch.complex64], ids=str)
def test_stored_weights_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    module = holder(*(random(shape, dtype) for shape in SHAPES))
    path = save(dict(module.named_parameters()), tmp_path / "m.safetensors")
    twin, loading = on_meta(module, path)
    for tensor, found in zip(module.parameters(), bring(twin, loading), strict=True):
        assert (found.dtype, found.shape, raw(found)) == (tensor.dtype, tensor.shape, raw(tensor))


@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str)
def test_casts_are_those_of_torch(stored: torch.dtype, used: torch.dtype, tmp_path: Path) -> None:
    module = holder(*(torch.randn(s).mul_(100).to(stored) for s in [(), (0,), (3, 5), (2, 1, 4)]))
    path = save(dict(module.named_parameters()), tmp_path / "m.safetensors")
    twin, loading = on_meta(module, path, used)
    for tensor, found in zip(module.parameters(), bring(twin, loading), strict=True):
        assert (found.dtype, found.shape, raw(found)) == (used, tensor.shape, raw(tensor.to(used)))


def test_a_mix_of_stored_cast_and_live_weights_is_one_slab(tmp_path: Path) -> None:
    module = holder(torch.randn(5), torch.randn(3, 3).half(), torch.randn(7))
    path = save({"w0": module.w0, "w1": module.w1}, tmp_path / "m.safetensors")
    known, loading = origins(path), Loading(Limits())
    twin = holder(torch.empty(5, device="meta"), torch.empty(3, 3, device="meta"), module.w2.detach())
    loading.defer(twin.w0, known["w0"])
    loading.defer(twin.w1, known["w1"])
    found = bring(twin, loading)
    assert [raw(t) for t in found] == [raw(module.w0), raw(module.w1.float()), raw(module.w2)]


def test_a_weight_without_data_and_origin_is_named() -> None:
    with pytest.raises(PlanMismatch, match="w0: the weight has no data"):
        bring(holder(torch.empty(3, device="meta")))


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    twin, loading = holder(torch.empty(3, device="meta")), Loading(Limits())
    path = save({"w0": torch.zeros(3)}, tmp_path / "m.safetensors")
    loading.defer(twin.w0, Origin(path, 8, 3, "F4", (3,)))
    with pytest.raises(Unsupported, match="dtype F4"):
        bring(twin, loading)
