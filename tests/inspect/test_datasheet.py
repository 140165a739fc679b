"""Accelerators by name: the table holds together, and names mean what people mean by them."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.errors import OverflowmlError
from overflowml_core.inspect.datasheet import (
    PAGEABLE_CEILING_BYTES_PER_S,
    UnknownAccelerator,
    datasheet_of,
    datasheets,
    find_named,
    link_bytes_per_s,
)
from overflowml_core.inspect.features import features_of
from overflowml_core.inspect.named import CONTEXT_BYTES, named_machine
from overflowml_core.machine import HostMemory, Machine, Rates

GIB = 2**30
MIB = 2**20
ALL = datasheets()
BASE = Machine(
    (), HostMemory(64 * GIB, 60 * GIB, 50 * GIB, 8, isa=frozenset({"avx2"})), Rates(1e10, 1e10, 3e9), 10**12, frozenset({"linux"})
)


def test_every_vendor_is_there_with_many_cards():
    assert len(ALL) >= 150
    assert {sheet.backend for sheet in ALL} == {"cuda", "rocm", "xpu", "mps"}


def test_the_page_counts_them():
    page = (Path(__file__).parents[2] / "docs" / "machines.md").read_text(encoding="utf-8")
    assert f"one of {len(ALL)} in `overflowml_core/data/accelerators.json`" in page


def test_no_name_twice_and_no_source_without_use():
    assert [name for name, count in Counter(sheet.name for sheet in ALL).items() if count > 1] == []
    document = json.loads((resources.files("overflowml_core") / "data" / "accelerators.json").read_text("utf-8"))
    assert set(document["sources"]) == {entry["source"] for entry in document["accelerators"]}
    assert all(len(text) > 12 for text in document["sources"].values())


@pytest.mark.parametrize("sheet", ALL, ids=lambda sheet: sheet.name)
def test_figures_are_plausible(sheet):
    assert sheet.source
    assert all(GIB <= size <= 600 * GIB for size in sheet.memory_options_bytes)
    assert len(set(sheet.memory_options_bytes)) == len(sheet.memory_options_bytes)
    assert 60e9 <= sheet.memory_bytes_per_s <= 8e12
    assert (sheet.link == "unified") is sheet.unified
    assert sheet.unified or link_bytes_per_s(sheet.link)
    f32, f16 = sheet.peak_flop_per_s("F32"), sheet.peak_flop_per_s("F16")
    assert 1e12 < f32 < 2e14
    assert 1 <= f16 / f32 <= 33
    for dtype, slower in (("BF16", "F16"), ("F8_E4M3", "BF16")):
        if sheet.peak_flop_per_s(dtype):
            assert sheet.peak_flop_per_s(dtype) / sheet.peak_flop_per_s(slower) == pytest.approx(
                {"BF16": 1, "F8_E4M3": 2}[dtype], rel=0.01
            ) or (dtype == "BF16" and "MI100" in sheet.name)
    assert ("fp8" in sheet.features) is bool(sheet.peak_flop_per_s("F8_E4M3"))
    assert ("bf16" in sheet.features) is bool(sheet.peak_flop_per_s("BF16"))


@pytest.mark.parametrize("sheet", ALL, ids=lambda sheet: sheet.name)
def test_rates_follow_from_units_and_clock(sheet):
    per_unit_and_cycle = sheet.peak_flop_per_s("F32") / sheet.unit_count / sheet.clock_hz
    assert min(abs(per_unit_and_cycle / lanes - 1) for lanes in (128, 256)) < 0.1
    tensor = sheet.peak_flop_per_s("F16") / sheet.unit_count / sheet.clock_hz
    # NVIDIA prints tensor rates of its server parts for a lower clock than the boost clock of the rest.
    slack = 0.16 if sheet.capability in ("9.0", "10.0", "10.3") else 0.06
    assert min(abs(tensor / 2**power - 1) for power in range(8, 14)) < slack


@pytest.mark.parametrize("sheet", ALL, ids=lambda sheet: sheet.name)
def test_features_agree_with_what_detection_derives(sheet):
    derived = features_of(sheet.backend, sheet.capability)
    # Tensor cores came with capability 7.0, integer products on them with 7.5, and the GTX 16 series has neither.
    assert derived == sheet.features


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("RTX 3090", "BF16", 71),
        ("RTX 4090", "F32", 82.6),
        ("RTX 4090", "BF16", 165.2),
        ("RTX 4090", "F8_E4M3", 330.3),
        ("RTX 5090", "BF16", 209.5),
        ("RTX 5090", "I8", 838),
        ("RTX 6000 Ada", "F8_E4M3", 728.5),
        ("RTX A6000", "F16", 154.8),
        ("A100", "BF16", 312),
        ("A100", "I8", 624),
        ("A10", "F16", 125),
        ("L4", "F8_E4M3", 242),
        ("L40S", "BF16", 362),
        ("H100", "BF16", 989),
        ("H100", "F8_E4M3", 1979),
        ("H100 PCIe", "BF16", 756),
        ("B200", "BF16", 2250),
        ("T4", "F16", 65),
        ("V100", "F16", 112),
        ("RTX 2080 Ti", "F16", 53.8),
        ("7900 XTX", "F16", 122.8),
        ("RX 9070 XT", "F8_E4M3", 389),
        ("MI300X", "BF16", 1307.4),
        ("MI355X", "F8_E4M3", 5033),
        ("MI210", "F16", 181),
        ("Arc A770", "F16", 137.6),
        ("Arc B580", "I8", 233),
        ("M2 Max", "F32", 13.6),
    ],
)
def test_figures_that_vendors_print(name, dtype, tera):
    assert find_named(name).peak_flop_per_s(dtype) == pytest.approx(tera * 1e12, rel=0.012)


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("RTX 4090", "NVIDIA GeForce RTX 4090", 24),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 24),
        ("4090", "NVIDIA GeForce RTX 4090", 24),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", 24),
        ("rtx 4090 24 GB", "NVIDIA GeForce RTX 4090", 24),
        ("RTX_4060-Ti 16GB", "NVIDIA GeForce RTX 4060 Ti", 16),
        ("RTX 4060 Ti", "NVIDIA GeForce RTX 4060 Ti", 8),
        ("RTX 3080", "NVIDIA GeForce RTX 3080", 10),
        ("RTX 3080 12GB", "NVIDIA GeForce RTX 3080 12GB", 12),
        ("RTX 4090 Laptop", "NVIDIA GeForce RTX 4090 Laptop GPU", 16),
        ("M4 Max 128GB", "Apple M4 Max (40-core GPU)", 128),
        ("m4max128gb", "Apple M4 Max (40-core GPU)", 128),
        ("M4 Max", "Apple M4 Max (32-core GPU)", 36),
        ("M3 Max 96GB", "Apple M3 Max (30-core GPU)", 96),
        ("H100 80GB", "NVIDIA H100 SXM5 80GB", 80),
        ("A100", "NVIDIA A100 SXM4 40GB", 40),
        ("A100 80GB", "NVIDIA A100 SXM4 80GB", 80),
        ("RTX 6000 48GB", "NVIDIA RTX 6000 Ada Generation", 48),
        ("Quadro RTX 6000", "NVIDIA Quadro RTX 6000", 24),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 96GB", 96),
        ("Intel(R) Arc(TM) A770 Graphics", "Intel Arc A770 Graphics", 16),
        ("Strix Halo 128GB", "AMD Radeon 8060S Graphics", 128),
    ],
)
def test_names_as_people_write_them(text, name, gib):
    found = find_named(text)
    assert (found.name, found.memory_bytes) == (name, gib * GIB)


@pytest.mark.parametrize("sheet", ALL, ids=lambda sheet: sheet.name)
def test_every_full_name_is_found(sheet):
    assert find_named(sheet.name).name == sheet.name
    assert find_named(sheet.name.upper()).name == sheet.name


def test_unknown_name_names_the_nearest_three():
    with pytest.raises(UnknownAccelerator, match="gpu='RTX 4900': no such accelerator") as caught:
        find_named("RTX 4900")
    assert len(caught.value.near) == 3
    assert "NVIDIA GeForce RTX 4080" in caught.value.near


def test_name_of_different_cards_lists_them():
    with pytest.raises(UnknownAccelerator, match="may be any of") as caught:
        find_named("RTX 6000")
    assert {"NVIDIA Quadro RTX 6000", "NVIDIA RTX 6000 Ada Generation"} < set(caught.value.near)


def test_size_that_is_not_sold_lists_the_sizes():
    with pytest.raises(UnknownAccelerator, match="not sold with 100GB; it has 36GB, 48GB, 64GB, 128GB"):
        find_named("M4 Max 100GB")


@given(st.text(max_size=200))
def test_any_text_is_an_accelerator_or_an_error(text):
    try:
        message = find_named(text).name
    except UnknownAccelerator as error:
        message = str(error)
    assert "\n" not in message


def test_long_text_is_cut():
    with pytest.raises(UnknownAccelerator) as caught:
        find_named("x" * 10**6)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "total", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", 24564 * MIB, "NVIDIA GeForce RTX 4090"),
        ("NVIDIA H100 80GB HBM3", 81559 * MIB, "NVIDIA H100 SXM5 80GB"),
        ("NVIDIA H200", 143771 * MIB, "NVIDIA H200"),
        ("NVIDIA B200", 183359 * MIB, "NVIDIA B200"),
        ("NVIDIA A100-SXM4-40GB", 40960 * MIB, "NVIDIA A100 SXM4 40GB"),
        ("Tesla T4", 15360 * MIB, "NVIDIA Tesla T4"),
        ("NVIDIA L4", 23034 * MIB, "NVIDIA L4"),
        ("NVIDIA GeForce RTX 3080", 12288 * MIB, "NVIDIA GeForce RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 3080", 10240 * MIB, "NVIDIA GeForce RTX 3080"),
        ("Apple M4 Max", 96 * GIB, "Apple M4 Max (40-core GPU)"),
        ("Apple M4 Max", 27 * GIB, "Apple M4 Max (32-core GPU)"),
        ("AMD Radeon RX 7900 XTX", 24560 * MIB, "AMD Radeon RX 7900 XTX"),
    ],
)
def test_detected_cards_are_known_by_name_and_size(name, total, expected):
    assert datasheet_of(name, total).name == expected


@pytest.mark.parametrize(
    ("name", "total"), [("AMD Radeon Graphics", 2 * GIB), ("NVIDIA GeForce RTX 4090", 4 * GIB), ("", GIB), ("Card 0", GIB)]
)
def test_cards_that_are_not_known_have_no_datasheet(name, total):
    assert datasheet_of(name, total) is None


@pytest.mark.parametrize(
    ("link", "giga"),
    [("PCIe 3.0 x16", 12), ("PCIe 4.0 x16", 25), ("PCIe 5.0 x16", 55), ("PCIe 4.0 x8", 12.5), ("PCIe 4.0 x1", 1.5625), ("NVLink-C2C", 411)],
)
def test_rates_of_links(link, giga):
    assert link_bytes_per_s(link)[0] == pytest.approx(giga * 1e9)


@pytest.mark.parametrize("link", ["", "unified", "PCIe 9.0 x16", "PCIe 4.0 x0", "PCIe 4.0 x", "AGP 8x"])
def test_what_is_no_link_has_no_rate(link):
    assert link_bytes_per_s(link) is None


@pytest.mark.parametrize("sheet", ALL, ids=lambda sheet: sheet.name)
def test_rates_to_plan_with_stay_below_what_is_printed(sheet):
    rates = sheet.rates(3e9)
    assert (rates.source, rates.disk_bytes_per_s, rates.measured) == ("datasheet", 3e9, False)
    assert rates.memory_bytes_per_s < sheet.memory_bytes_per_s
    assert 0 < rates.pageable_h2d_bytes_per_s < rates.h2d_bytes_per_s
    assert rates.pageable_h2d_bytes_per_s <= PAGEABLE_CEILING_BYTES_PER_S
    for kind in ("matmul", "conv", "attention"):
        for dtype, peak in sheet.flop_per_s:
            assert 0.2 * peak < rates.flop_per_s(kind, dtype) < peak
    assert rates.flop_per_s("matmul", "BF16") > 0  # computed in F32 where the hardware lacks it
    assert rates.flop_per_s("attention", "F16") < rates.flop_per_s("matmul", "F16")


def test_rates_follow_the_link_that_is_there():
    assert find_named("RTX 5090").rates(1e9, "PCIe 4.0 x8").h2d_bytes_per_s == pytest.approx(12.5e9)
    assert find_named("RTX 5090").rates(1e9, "nonsense").h2d_bytes_per_s == pytest.approx(55e9)


def test_named_machine_has_its_memory_free_but_the_context():
    machine = named_machine("RTX 4090", base=BASE)
    (card,) = machine.accelerators
    assert (machine.named, machine.host, machine.disk_free_bytes, machine.environment) == (True, BASE.host, 10**12, {"linux"})
    assert (card.total_bytes, card.free_bytes) == (24 * GIB, 24 * GIB - CONTEXT_BYTES)
    assert (card.link, card.capability, card.kind, card.torch_name) == ("PCIe 4.0 x16", "8.9", "cuda", "cuda:0")
    assert machine.rates == card.rates
    assert machine.rates.disk_bytes_per_s == 3e9
    assert machine.cpu_rates == BASE.rates


def test_ram_that_is_named_is_free():
    host = named_machine("RTX 5090", ram_bytes=194 * 10**9, base=BASE).host
    assert (host.total_bytes, host.available_bytes, host.core_count) == (194 * 10**9, 194 * 10**9, 8)
    assert host.pinnable_bytes < host.available_bytes


def test_unified_memory_is_three_quarters_of_the_ram_that_was_named_with_it():
    machine = named_machine("M4 Max 128GB", base=BASE)
    (chip,) = machine.accelerators
    assert (machine.host.total_bytes, chip.total_bytes, chip.free_bytes) == (128 * GIB, 96 * GIB, 96 * GIB)
    assert (chip.unified, chip.kind, machine.environment, machine.host.isa) == (True, "mps", {"macos"}, {"neon"})


def test_several_accelerators_are_numbered_by_kind():
    machine = named_machine("RTX 4090, 2x RTX 3060, 7900 XTX, Arc A770", base=BASE)
    assert [a.torch_name for a in machine.accelerators] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "xpu:0"]
    assert machine.rates_of(1).h2d_bytes_per_s == pytest.approx(25e9)
    assert machine.compute.name == "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize("text", ["", ",", "RTX 4090,", "0x RTX 4090", "65x RTX 4090", "99999999x RTX 4090", "2x", "RTX 4090, banana"])
def test_lists_that_name_no_machine(text):
    with pytest.raises(OverflowmlError, match="gpu="):
        named_machine(text, base=BASE)


def test_named_machine_stands_in_this_one_by_default():
    machine = named_machine("RTX 4090")
    assert machine.host.core_count >= 1
    assert machine.cpu_rates.flop_per_s("matmul", "F32") > 0
