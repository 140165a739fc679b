"""Quantized files by the real comfy-kitchen: what they hold, that the bytes are the plan's, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("comfy_kitchen", reason="no comfy-kitchen: pip install comfy-kitchen", exc_type=ImportError)

import quantizing
import torch
from flux_files import flux_shapes, live_flux, write_header
from quantizing import encoder, is_linear_in_block, save_model, shapes, worked_out
from safetensors import safe_open

from overflowml_comfyui import encoding, quantized_file
from overflowml_comfyui.encoding import Encoder
from overflowml_comfyui.formats import FORMATS, planned
from overflowml_comfyui.quantize import file_name, obtain_file
from overflowml_core.errors import FileChanged, OverflowmlError
from overflowml_core.layout import align
from tests.planner.build import machine as any_machine


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """The file of a model, its weights, and the folder for what is made of it."""
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    path = tmp_path / "tiny.safetensors"
    return path, save_model(path, metadata={"modelspec.title": "tiny"}), folder


def _obtain(layout, folder, encoders=None, progress=lambda done, total: None):
    encoders = encoders or {name: encoder(name) for name in FORMATS}
    return obtain_file(layout, encoders, [folder], progress)


def _files(folder):
    return sorted(path.name for path in folder.iterdir())


def _layout_class(name):
    return encoder(name)._layout


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_weight_takes_the_bytes_that_the_planner_was_told_and_comes_back(name):
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    parts = encoder(name).encode(weight, "w")
    format = planned(FORMATS[name], any_machine(2**30), True)

    assert [part.nbytes for part in parts.values()] == [part.nbytes(256, 384) for part in format.parts]
    assert format.converts(256, 384, "BF16")
    assert encoder(name).fault() == ""


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stretches_of_rows_have_the_bits_of_the_whole_weight(monkeypatch, name, dtype):
    weight = torch.randn(160, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    options = {"scale": "recalculate"} if name == "fp8" else {"per_channel": True}
    layout = _layout_class(name)
    whole = layout.state_dict_tensors(*layout.quantize(weight, **options))
    monkeypatch.setattr(encoding, "_STRETCH_COUNT", 96 * 7)

    for suffix, part in encoder(name).encode(weight, "w").items():
        assert torch.equal(part.view(torch.uint8) if part.dim() else part, whole[suffix].view(torch.uint8) if part.dim() else whole[suffix])


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_weight_of_zeros_stays_one(name):
    one = encoder(name)
    parts = one.encode(torch.zeros(128, 128, dtype=torch.bfloat16), "w")

    assert all(not part.float().isnan().any() for part in parts.values() if part.dtype is not torch.uint8)
    assert not parts[""].view(torch.uint8).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_with_nan_is_refused_by_name_and_nothing_is_left(model, bad):
    from safetensors.torch import save_file

    path, weights, folder = model
    weights["single_blocks.1.linear1.weight"][3, 5] = bad
    save_file(weights, str(path))
    layout, _ = worked_out(path, "int8")

    with pytest.raises(OverflowmlError, match=r"single_blocks\.1\.linear1\.weight: it holds NaN or infinity"):
        _obtain(layout, folder)
    assert _files(folder) == []


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_file_holds_formats_in_blocks_and_everything_else_as_it_was(model, name):
    path, weights, folder = model
    layout, part = worked_out(path, name)
    made = _obtain(layout, folder)

    assert made.is_new
    assert made.path.stat().st_size == layout.file_bytes
    converted = {weight for weight in shapes() if is_linear_in_block(weight)}
    assert {f"{layer}.weight" for layer in layout.formats} == converted
    with safe_open(made.path, "pt") as file:  # the format's own reader
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- no mapping
        metadata = file.metadata()
    for weight, values in weights.items():
        if weight not in converted:
            assert torch.equal(found[weight], values)
            continue
        parts = {one.suffix: found[weight + one.suffix] for one in FORMATS[name].parts}
        assert all(
            torch.equal(parts[key].view(torch.uint8), made.view(torch.uint8)) for key, made in _encoded(name, values).items() if made.dim()
        )
        mark = found[weight.removesuffix("weight") + "comfy_quant"]
        assert json.loads(mark.numpy().tobytes()) == {"format": FORMATS[name].algorithm}
    assert set(found) == set(weights) | {
        key for w in converted for key in (*(w + one.suffix for one in FORMATS[name].parts), w.removesuffix("weight") + "comfy_quant")
    }
    assert metadata["modelspec.title"] == "tiny"
    assert json.loads(metadata["overflowml"])["plan"] == part.fingerprint
    # What a device holds of each block is what the plan has for it.
    for placement in part.plan.placements():
        own = [t for key, t in found.items() if key.startswith(f"{placement.block}.") and not key.endswith("comfy_quant")]
        assert sum(align(t.nbytes) for t in own) == placement.stored_bytes


def _encoded(name, weight):
    return encoder(name).encode(weight, "w")


class _Counting(Encoder):
    """Counts weights over all encoders."""

    seen: list[str] = []
    wait_s = 0.0

    def encode(self, weight, name):
        self.seen.append(name)
        time.sleep(self.wait_s)
        return super().encode(weight, name)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(_Counting, "seen", [])
    return {"int8": encoder("int8", _Counting)}


def test_a_file_is_made_once_and_found_by_every_budget_that_decides_the_same(model, counted):
    path, _, folder = model
    first = _obtain(worked_out(path, "int8")[0], folder, counted)
    before = len(_Counting.seen)
    layout, part = worked_out(path, "int8", budget="3GB")
    second = _obtain(layout, folder, counted)

    assert before == len(first.layout.formats) > 0
    assert (second.path, second.is_new, len(_Counting.seen)) == (first.path, False, before)
    assert part.fingerprint != first.layout.record.plan
    assert _files(folder) == [first.path.name] == [file_name(layout)]


def test_a_changed_source_is_made_anew_in_the_same_place(model, counted):
    path, _, folder = model
    _obtain(worked_out(path, "int8")[0], folder, counted)
    before = len(_Counting.seen)
    save_model(path)  # the same shapes; another time
    os.utime(path, ns=(0, 10**18))
    made = _obtain(worked_out(path, "int8")[0], folder, counted)

    assert made.is_new
    assert len(_Counting.seen) == 2 * before
    assert _files(folder) == [made.path.name]


@pytest.mark.parametrize("damage", ["byte", "cut", "header", "empty", "other"])
def test_a_damaged_file_is_noticed_and_made_again(model, counted, damage, caplog):
    path, _, folder = model
    layout, _ = worked_out(path, "int8")
    made = _obtain(layout, folder, counted).path
    whole = made.read_bytes()
    broken = {
        "byte": whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:],
        "cut": whole[:-1],
        "header": whole[:50] + b"#" + whole[51:],
        "empty": b"",
        "other": path.read_bytes(),
    }
    made.write_bytes(broken[damage])
    again = _obtain(worked_out(path, "int8")[0], folder, counted)

    assert again.is_new
    assert caplog.text.count(str(made)) == 1
    assert again.path.read_bytes()[-again.layout.weight_bytes :] == whole[-again.layout.weight_bytes :]
    assert quantized_file.is_whole(again.path)


def test_a_touched_file_is_read_once_and_trusted_again(model, counted):
    path, _, folder = model
    made = _obtain(worked_out(path, "int8")[0], folder, counted).path
    os.utime(made)
    assert not _obtain(worked_out(path, "int8")[0], folder, counted).is_new
    record = quantized_file.Record.of(quantized_file.read_header(made))
    assert made.stat().st_mtime_ns == record.written_s * 10**9


def test_two_at_once_end_with_one_right_file(model, counted, monkeypatch):
    path, _, folder = model
    monkeypatch.setattr(_Counting, "wait_s", 0.02)
    ended = []

    def run():
        ended.append(_obtain(worked_out(path, "int8")[0], folder, counted))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(made.is_new for made in ended) == [False, False, True]
    assert len(_Counting.seen) == len(ended[0].layout.formats)
    assert _files(folder) == [ended[0].path.name]
    assert quantized_file.is_whole(ended[0].path)


class _Cancelled(BaseException):
    """The host's own exception for this is none of Exception's."""


def test_a_cancelled_run_leaves_nothing_and_the_next_one_makes_the_file(model):
    path, _, folder = model
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == 20:
            raise _Cancelled

    layout, _ = worked_out(path, "fp8")
    with pytest.raises(_Cancelled):
        _obtain(layout, folder, progress=progress)
    assert _files(folder) == []
    assert _obtain(layout, folder, progress=lambda done, total: calls.append((done, total))).is_new
    assert calls[-1][0] == calls[-1][1] == sum(entry.nbytes for entry in layout.source.tensors.values())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(model, monkeypatch):
    path, _, folder = model
    layout, _ = worked_out(path, "int8")
    real, written = os.write, []

    def write(descriptor, data):
        written.append(len(data))
        if sum(written) > layout.file_bytes // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OverflowmlError, match="No space left on device") as caught:
        _obtain(layout, folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert _files(folder) == []


def test_a_folder_without_room_or_rights_is_passed_over(model, monkeypatch, tmp_path):
    path, _, folder = model
    layout, _ = worked_out(path, "int8")
    gone = tmp_path / "gone"
    one = {"int8": encoder("int8")}

    assert obtain_file(layout, one, [gone, folder], lambda *_: None).path.parent == folder
    (folder / file_name(layout)).unlink()
    usage = type("Usage", (), {"free": layout.file_bytes - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(OverflowmlError, match="there is no place for it") as caught:
        obtain_file(layout, one, [gone, folder], lambda *_: None)
    assert "gone cannot be written" in str(caught.value)
    assert "MiB free" in str(caught.value)
    assert _files(folder) == []


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_part_is_not(model):
    path, _, folder = model
    layout, _ = worked_out(path, "int8")
    dead, alive = (folder / f".{file_name(layout)[:100]}.{name}.part" for name in ("dead", "alive"))
    dead.write_bytes(b"half")
    with alive.open("wb") as held:
        quantized_file.share(held.fileno())
        _obtain(layout, folder)
        assert _files(folder) == sorted([alive.name, file_name(layout)])


def test_a_source_that_is_written_to_meanwhile_ends_the_work(model):
    path, _, folder = model
    layout, _ = worked_out(path, "int8")

    def progress(done, total):
        if done:
            os.utime(path, ns=(0, 10**18))

    with pytest.raises(FileChanged):
        _obtain(layout, folder, progress=progress)
    assert _files(folder) == []


def test_a_checkpoints_model_is_taken_out_of_it_with_what_tells_how_to_sample_it(tmp_path):
    path, folder = tmp_path / "whole.safetensors", tmp_path / "made"
    folder.mkdir()
    beside = {"first_stage_model.decoder.conv_in.weight": torch.ones(4, 4, 3, 3), "v_pred": torch.zeros(0)}
    weights = save_model(path, "model.diffusion_model.", beside=beside)
    layout, _ = worked_out(path, "fp8", prefix="model.diffusion_model.", label="checkpoints/whole.safetensors")
    made = _obtain(layout, folder)

    with safe_open(made.path, "pt") as file:
        names = set(file.keys())
    assert set(weights) | {"v_pred"} <= names
    assert not any(name.startswith(("first_stage", "model.")) for name in names)


def _peak_bytes(reset=False):
    """Most RAM that this process held at a time since the last reset; the system forgets the peak where 5 is written there."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not forget a peak of memory")
def test_a_model_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    large = flux_shapes(1024, 2, 2, 64, 32)
    monkeypatch.setattr(quantizing, "shapes", lambda: large)
    nbytes = write_header(tmp_path / "large.safetensors", large)
    layout, _ = worked_out(tmp_path / "large.safetensors", "fp8", label="diffusion_models/large.safetensors")
    encoders = {"fp8": encoder("fp8")}
    before = _peak_bytes(reset=True)
    _obtain(layout, tmp_path, encoders)
    took = _peak_bytes() - before

    assert layout.file_bytes < nbytes * 0.55
    assert took < nbytes // 3, (nbytes, took)


def test_a_live_model_with_quantized_weights_computes_what_it_did_and_holds_less():
    from overflowml_comfyui.profile import with_profiles
    from overflowml_core import session
    from overflowml_core.facts import Workload

    def described(change):
        module = live_flux(flux_shapes(128, 2, 2, 64, 32), "tests")
        for name, weight in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            values = change(name, torch.zeros(weight.shape, dtype=torch.bfloat16))
            setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
        workload = Workload(width=512, height=512, steps=4)
        return with_profiles(session.describe(module, workload), module, workload).components[0]

    def quantized(name, values):
        from comfy_kitchen.tensor import QuantizedTensor

        is_one = is_linear_in_block(name)
        return QuantizedTensor.from_float(values, "TensorWiseINT8Layout", per_channel=True) if is_one else values

    plain, small = described(lambda name, values: values), described(quantized)

    assert small.activation_bytes == plain.activation_bytes > 10**6
    assert small.weight_bytes < 0.7 * plain.weight_bytes
    assert len(small.profiles) == len(plain.profiles) == 1
