"""The numbers that the planner is told about torchao's formats are torchao's own."""

from __future__ import annotations

import pytest

from overflowml_core.facts import Accelerator, HostMemory, Machine, Rates
from overflowml_torchao import BITS, RELATIVE_ERRORS, overflowml_formats

torch = pytest.importorskip("torch")
quantization = pytest.importorskip("torchao.quantization")

HOST = HostMemory(2**34, 2**34, 2**33, 2)
RATES = Rates(25e9, 25e9, 5e9, memory_bytes_per_s=900e9)
GPU = Machine((Accelerator("cuda", "a GPU", 0, 2**34, 2**34),), HOST, RATES, 2**40)
CPU = Machine((), HOST, RATES, 2**40)


@pytest.mark.parametrize(("name", "config"), [("int8", "Int8WeightOnlyConfig"), ("fp8", "Float8WeightOnlyConfig")])
def test_bits_and_error_are_those_of_the_tensors_that_torchao_makes(name, config):
    torch.manual_seed(0)
    linear = torch.nn.Linear(3072, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.normal_(0, 0.02)
    plain = linear.weight.detach().float().clone()
    model = torch.nn.Sequential(linear)
    quantization.quantize_(model, getattr(quantization, config)())
    weight = model[0].weight
    inner, _ = weight.__tensor_flatten__()
    bits = sum(getattr(weight, part).numel() * getattr(weight, part).element_size() for part in inner) * 8 / plain.numel()
    assert bits == pytest.approx(BITS[name], abs=0.01)
    error = (weight.dequantize().float() - plain).pow(2).mean().sqrt() / plain.pow(2).mean().sqrt()
    assert float(error) == pytest.approx(RELATIVE_ERRORS[name], rel=0.1)


def test_error_of_int4_in_groups_of_128():
    groups = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    low, high = groups.min(1, keepdim=True)[0], groups.max(1, keepdim=True)[0]
    step = (high - low) / 15
    rounded = ((groups - low) / step).round().clamp(0, 15) * step + low
    error = (rounded - groups).pow(2).mean().sqrt() / groups.pow(2).mean().sqrt()
    assert float(error) == pytest.approx(RELATIVE_ERRORS["int4"], rel=0.05)


def test_a_cpu_has_no_int4_and_pays_for_decoding():
    assert {form.name for form in overflowml_formats(GPU)} == {"fp8", "int8", "int4"}
    assert {form.name for form in overflowml_formats(CPU)} == {"fp8", "int8"}
    assert all(0 < form.decode_bytes_per_s < 10e9 for form in overflowml_formats(CPU))
    assert all(form.decode_bytes_per_s == pytest.approx(600e9) for form in overflowml_formats(GPU))
    assert {form.name for form in overflowml_formats(GPU) if form.loss == "any"} == {"int4"}
