"""Which layers a plan converts, and which files are refused before anything is read: no package converts anything here."""

from __future__ import annotations

import json
import os

import pytest
from flux_files import flux_shapes, write_header
from quantizing import GIB, asked, is_linear_in_block, linears, machine, shapes, worked_out

from overflowml_comfyui.formats import FORMATS
from overflowml_comfyui.quantize import clipped, decide, file_name, layer_formats, obtain_file
from overflowml_comfyui.quantized_file import light
from overflowml_comfyui.request import request_of
from overflowml_comfyui.source import describe, model_of, open_source
from overflowml_core.errors import BadCheckpoint, BadSize, DoesNotFit, NotAModel, OverflowmlError, UnsafeCheckpoint, Unsupported
from overflowml_core.facts import Workload


@pytest.fixture
def path(tmp_path):
    """The header of a tiny Flux; its data is a hole."""
    file = tmp_path / "tiny.safetensors"
    write_header(file, shapes())
    return file


def _described(path, known=None):
    source = model_of(open_source(path, "diffusion_models/tiny.safetensors"), "model.diffusion_model.")
    return describe(source, linears() if known is None else known, Workload(width=512, height=512, steps=4))


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_plan_converts_what_is_linear_in_blocks_and_counts_its_bytes(path, name):
    layout, part = worked_out(path, name)

    assert {f"{layer}.weight" for layer in layout.formats} == {weight for weight in shapes() if is_linear_in_block(weight)}
    assert part.plan.formats == (FORMATS[name].algorithm,)
    whole = sum(entry.nbytes for entry in layout.source.tensors.values())
    assert layout.weight_bytes < whole
    assert file_name(layout).startswith(f"tiny-{name}-")


def test_layers_that_the_host_would_not_read_in_a_format_stay(path):
    known = {name: shape for name, shape in linears().items() if "txt" not in name}
    known["single_blocks.0.linear1"] = (1, 1)  # the host has another shape there
    network, layers = _described(path, known)
    names = {layer.name for found in layers.values() for layer in found}

    assert names
    assert not any("txt" in name for name in names)
    assert "single_blocks.0.linear1" not in names
    assert {"img_in", "final_layer.linear", "vector_in.in_layer"}.isdisjoint(names)
    assert all(
        block.linear_count == sum(layer.rows * layer.columns for layer in layers[block.name]) for block in network.components[0].blocks
    )


def test_tensors_in_the_middle_of_no_module_count_outside_the_blocks(tmp_path):
    path = tmp_path / "wan.safetensors"
    write_header(path, {**shapes(), "single_blocks.0.modulation": (1, 6, 128), "scale_shift_table": (6, 128)})
    layout, part = worked_out(path, "int8")

    assert part.plan.phases[0].fixed_bytes > worked_out_fixed_bytes(tmp_path)
    assert {"single_blocks.0.modulation", "scale_shift_table"} <= {stored.name for stored, _ in layout.tensors}


def worked_out_fixed_bytes(folder):
    path = folder / "plain.safetensors"
    write_header(path, shapes())
    return worked_out(path, "int8")[1].plan.phases[0].fixed_bytes


def test_layers_whose_shape_a_format_cannot_have_stay_in_a_file_of_the_others(tmp_path):
    path = tmp_path / "odd.safetensors"
    odd = {**shapes(), "single_blocks.0.linear2.weight": (120, 640), "single_blocks.0.linear2.bias": (120,)}
    write_header(path, odd)
    known = {**linears(), "single_blocks.0.linear2": (120, 640)}
    source = model_of(open_source(path, "x"), "")
    network, layers = describe(source, known, Workload())
    wanted = asked("nvfp4")
    part = decide("odd", network, request_of({}), wanted, machine())

    chosen = layer_formats(part, layers, wanted.formats)
    assert "single_blocks.0.linear2" not in chosen
    assert "single_blocks.0.linear1" in chosen


def test_auto_leaves_weights_as_they_are_where_they_fit_and_converts_where_they_do_not(tmp_path):
    path = tmp_path / "flux.safetensors"
    real = flux_shapes()
    write_header(path, real)
    known = {name.removesuffix(".weight"): shape for name, shape in real.items() if len(shape) == 2}
    source = model_of(open_source(path, "x"), "")
    network, layers = describe(source, known, Workload(width=1024, height=1024, steps=4))
    wanted = asked("int8", "fp8", "nvfp4", quality="minimal", is_demanded=False)

    roomy = decide("flux", network, request_of({}), wanted, machine(80 * GIB))
    assert layer_formats(roomy, layers, wanted.formats) == {}
    tight = decide("flux", network, request_of({"budget": "16GB"}), wanted, machine(24 * GIB))
    assert {one.name for one in layer_formats(tight, layers, wanted.formats).values()} == {"int8"}  # the most exact of equals
    assert tight.verdict == "fits"
    any_loss = asked("int8", "fp8", "nvfp4", quality="any", is_demanded=False)
    least = decide("flux", network, request_of({"budget": "9GB"}), any_loss, machine(24 * GIB))
    assert {one.name for one in layer_formats(least, layers, any_loss.formats).values()} == {"nvfp4"}


@pytest.mark.parametrize("budget", ["0", "0GB", "-1GB", "nan"])
def test_a_budget_of_nothing_is_refused_by_name(path, budget):
    with pytest.raises(BadSize, match="budget"):
        worked_out(path, "int8", budget=budget)


def test_a_budget_that_is_too_small_is_one_sentence_in_the_nodes_words(path):
    with pytest.raises(DoesNotFit, match="budget='") as caught:
        worked_out(path, "int8", budget="1MB")
    assert str(caught.value).startswith("tiny: ")
    assert "overflow=" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_of_a_budget_beyond_the_card_what_there_is_counts_and_the_report_says_so(path):
    network, _ = _described(path)
    part = decide("tiny", network, request_of({"budget": "90GB"}), asked("int8"), machine(24 * GIB))

    assert part.plan.budget.device_bytes == 24 * GIB
    assert clipped(part, 90 * 10**9) == ["budget of cuda:0: asked for 83.82 GiB, but only 24.00 GiB is free"]
    assert clipped(part, None) == clipped(part, 24 * GIB) == []


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("x.ckpt", UnsafeCheckpoint, "pickle"),
        ("x.pt", UnsafeCheckpoint, "safetensors"),
        ("x.gguf", Unsupported, "quantized already"),
        ("x.txt", NotAModel, ".safetensors"),
        ("gone.safetensors", BadCheckpoint, "cannot be read"),
    ],
)
def test_other_kinds_of_files_are_refused_unopened(tmp_path, name, error, words):
    if not name.startswith("gone"):
        os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(error, match=words):
        open_source(tmp_path / name, name)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_a_cut_file_is_refused_by_its_header(path, keep):
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    with pytest.raises(BadCheckpoint, match=r"cut short|bytes long"):
        open_source(path, "x")


def _rewritten(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8 : 8 + length]))
    text = json.dumps(header).encode()
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _add(name, dtype, shape, nbytes):
    def change(header):
        end = max(entry["data_offsets"][1] for entry in header.values())
        return {**header, name: {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}}

    return change


@pytest.mark.parametrize(
    "change",
    [
        _add("single_blocks.0.linear1.comfy_quant", "U8", [29], 29),
        _add("scaled_fp8", "F8_E4M3", [2], 2),
        _add("single_blocks.0.linear1.scale_weight", "F32", [1], 4),
        _add("single_blocks.0.extra.weight", "F8_E4M3", [4, 4], 16),
        _add("single_blocks.0.extra.weight", "U8", [4, 4], 16),
        lambda header: {"__metadata__": {"_quantization_metadata": "{}"}, **header},
    ],
    ids=["comfy_quant", "scaled fp8", "old scale", "fp8", "packed", "metadata"],
)
def test_weights_that_are_quantized_already_are_refused(path, change):
    _rewritten(path, change)
    with pytest.raises(Unsupported, match="quantized already") as caught:
        model_of(open_source(path, "x"), "model.diffusion_model.")
    assert len(str(caught.value).splitlines()) == 1


def test_a_quantized_text_encoder_beside_the_model_does_not_count(tmp_path):
    path = tmp_path / "whole.safetensors"
    write_header(path, {f"model.diffusion_model.{name}": shape for name, shape in shapes().items()})
    _rewritten(path, _add("text_encoders.t5xxl.q.weight", "F8_E4M3", [4, 4], 16))
    source = model_of(open_source(path, "x"), "model.diffusion_model.")

    assert set(source.tensors) == set(shapes())


def test_of_a_model_that_is_told_apart_only_small_tensors_are_read(path):
    pytest.importorskip("torch", exc_type=ImportError)
    source = open_source(path, "x")
    found = light(source)

    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes()
    assert {tensor.is_meta for tensor in found.values()} == {True, False}
    assert all(tensor.is_meta == (entry.nbytes > 2**16) for tensor, entry in zip(found.values(), source.tensors.values(), strict=True))


def test_a_file_without_weights_is_no_model(tmp_path):
    path = tmp_path / "empty.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(NotAModel, match="no weights"):
        model_of(open_source(path, "x"), "")


def test_where_there_is_no_folder_the_sentence_says_what_is_needed(path):
    layout, _ = worked_out(path, "int8")
    with pytest.raises(OverflowmlError, match="no folder for diffusion models"):
        obtain_file(layout, {}, [], lambda *_: None)
