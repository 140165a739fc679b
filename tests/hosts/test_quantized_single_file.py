"""``from_single_file``: GGUF and plain safetensors, read from where they are, with the output of the unmanaged load."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch
from diffusers.loaders import single_file, single_file_model, single_file_utils
from safetensors.torch import save_file

import overflowml
from overflowml_core import session
from overflowml_core.errors import BadCheckpoint, BadLimits, NotAModel, UnsafeCheckpoint
from overflowml_core.facts import Workload
from overflowml_core.loading import current
from tests.hosts import pipelines
from tests.hosts.check import assert_one_line, assert_same, assert_same_weights, smallest
from tests.runtime.build import raw

gguf = pytest.importorskip("gguf")
_Q8_0, _Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
_CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 5,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
    "guidance_embeds": True,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Flux transformer."""
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    df.FluxTransformer2DModel(**_CONFIG).save_pretrained(folder)
    return folder


def _weights(config: Path) -> dict[str, torch.Tensor]:
    return dict(df.FluxTransformer2DModel.from_pretrained(config).state_dict())


def write_gguf(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    """Linear weights of blocks in Q8_0 and Q4_0, everything else in float32."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "blocks." in name:
            kind = _Q8_0 if "attn" in name else _Q4_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def packed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights in a GGUF file."""
    return write_gguf(_weights(config), tmp_path_factory.mktemp("gguf") / "flux.gguf")


def load(path: Path, config: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    if path.suffix == ".gguf":
        options["quantization_config"] = df.GGUFQuantizationConfig(compute_dtype=dtype)
    return df.FluxTransformer2DModel.from_single_file(str(path), config=str(config), torch_dtype=dtype, **options)


def run(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    with torch.no_grad():
        return model(
            hidden_states=random(1, 16, 16),
            encoder_hidden_states=random(1, 8, 32),
            pooled_projections=random(1, 32),
            timestep=torch.tensor([0.5]).to(dtype),
            guidance=torch.tensor([3.0]).to(dtype),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
        ).sample


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if hasattr(tensor, "quant_type") else tensor


def same_state(ours: Any, theirs: Any) -> None:
    """Names, classes, formats and bits of all weights."""
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert type(left[name]) is type(right[name]), name
        assert getattr(left[name], "quant_type", None) == getattr(right[name], "quant_type", None), name
        assert raw(_plain(left[name])) == raw(_plain(right[name])), name


def pieces(model: Any) -> set[Path]:
    """The files that blocks are read from."""
    return {piece.path for held in overflowml.attachment(model)._held for piece in held.home.pieces}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gguf_file_computes_the_same_and_comes_back(dtype: torch.dtype, packed: Path, config: Path) -> None:
    theirs = load(packed, config, dtype)
    expected = run(theirs, dtype)
    limits = smallest(theirs)
    stored = sum(tensor.nbytes for tensor in theirs.state_dict().values())
    assert limits.device_bytes < stored
    model = load(packed, config, dtype, overflow=limits)
    attachment = overflowml.attachment(model)
    assert attachment.plan.strategy == "stream"
    # In float32 the biases are used as they are stored, so that whole blocks are read from the file itself.
    assert (pieces(model) == {packed}) is (dtype is torch.float32)
    for _ in range(2):
        assert_same(run(model, dtype), expected)
    same_state(model, theirs)
    assert overflowml.release(model)
    same_state(model, theirs)
    assert_same(run(model, dtype), expected)


def test_a_gguf_file_that_fits_is_read_whole(packed: Path, config: Path) -> None:
    theirs = load(packed, config)
    model = load(packed, config, overflow=True)
    assert overflowml.attachment(model).plan.strategy == "direct"
    same_state(model, theirs)
    assert_same(run(model), run(theirs))


def test_nothing_of_a_gguf_file_is_read_by_the_host(packed: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    fill = single_file_model.load_model_dict_into_meta.__wrapped__

    def watched(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        left.extend(state_dict)
        return fill(model, state_dict, *args, **kwargs)

    overflowml.uninstall()
    monkeypatch.setattr(single_file_model, "load_model_dict_into_meta", watched)
    overflowml.install()
    load(packed, config, overflow=smallest(load(packed, config)))
    assert len(left) == len(_weights(config))
    left.clear()
    load(packed, config, overflow=True)
    assert left == []


def test_facts_of_a_gguf_model(packed: Path, config: Path) -> None:
    theirs = load(packed, config)
    ours = load(packed, config, overflow=smallest(theirs))
    (component,) = overflowml.attachment(ours).network.components
    (whole,) = session.describe(df.FluxTransformer2DModel.from_pretrained(config), Workload()).components
    (live,) = session.describe(theirs, Workload()).components
    assert component.fingerprint == live.fingerprint != whole.fingerprint
    assert [b.weight_count for b in component.blocks] == [b.weight_count for b in whole.blocks]
    for block, before in zip(component.blocks, whole.blocks, strict=True):
        assert block.linear_count == 0
        assert block.stored_bytes < before.stored_bytes * 0.4
        assert {name for name, _ in block.bytes_by_dtype} == {"F32", "U8"}
    assert component.activation_source == "traced"


def _fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As original checkpoints have it: queries, keys and values stacked."""
    out = dict(tensors)
    for name in [name for name in tensors if ".attn.to_q." in name]:
        parts = [out.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        out[name.replace("to_q", "qkv")] = torch.cat(parts)
    return out


def _split(checkpoint: dict[str, Any], **_: Any) -> dict[str, Any]:
    """As diffusers' conversions take them apart."""
    out = {}
    for name, tensor in checkpoint.items():
        if ".qkv." not in name:
            out[name] = tensor
            continue
        for part, chunk in zip(("to_q", "to_k", "to_v"), torch.chunk(tensor, 3, dim=0), strict=True):
            out[name.replace("qkv", part)] = torch.cat([chunk])
    return out


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own conversion has the width of the real model written into it."""
    entry = {**single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"], "checkpoint_mapping_fn": _split}
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "FluxTransformer2DModel", entry)


@pytest.mark.usefixtures("stacked")
def test_parts_of_stacked_weights_are_read_from_the_file(config: Path, tmp_path: Path) -> None:
    path = write_gguf(_fused(_weights(config)), tmp_path / "stacked.gguf")
    theirs = load(path, config)
    model = load(path, config, overflow=smallest(theirs))
    assert pieces(model) == {path}
    same_state(model, theirs)
    assert_same(run(model), run(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("stacked")
def test_a_single_safetensors_file_is_left_unread(dtype: torch.dtype, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(_fused(_weights(config)), path)
    theirs = load(path, config, dtype)
    model = load(path, config, dtype, overflow=smallest(theirs))
    assert (pieces(model) == {path}) is (dtype is torch.float32)
    assert_same(run(model, dtype), run(theirs, dtype))
    assert_same_weights(model, theirs, managed=True)
    overflowml.release(model)
    assert_same_weights(model, theirs)


def test_the_modules_that_stay_in_float32_are_decoded_by_the_host(packed: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(df.FluxTransformer2DModel, "_keep_in_fp32_modules", ["to_out"])
    theirs = load(packed, config, torch.bfloat16)
    model = load(packed, config, torch.bfloat16, overflow=smallest(theirs))
    assert model.transformer_blocks[0].attn.to_out[0].weight.dtype is torch.float32
    same_state(model, theirs)


def test_a_pipeline_from_a_single_file(config: Path, saved_pipeline: Any, tmp_path: Path) -> None:
    folder = saved_pipeline("flux")
    whole = df.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    path = tmp_path / "flux.safetensors"
    save_file(dict(whole.state_dict()), path)
    options = {**pipelines.without_tokenizers("flux"), "text_encoder": None, "text_encoder_2": None, "vae": None}
    theirs = df.FluxPipeline.from_single_file(str(path), config=str(folder), **options)
    pipe = df.FluxPipeline.from_single_file(str(path), config=str(folder), overflow=smallest(theirs), **options)
    assert overflowml.attachment(pipe).plan.strategy == "stream"
    assert pieces(pipe) == {path}
    assert_same_weights(pipe.transformer, whole, managed=True)
    overflowml.release(pipe)
    assert_same_weights(pipe.transformer, whole)


@pytest.mark.usefixtures("nothing_left_behind")
def test_files_that_cannot_be_read_are_refused_before_the_host_opens_them(packed: Path, config: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(pickle.dumps({}))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(packed.read_bytes()[:-100])
    for path, kind in (
        (pickled, UnsafeCheckpoint),
        (cut, BadCheckpoint),
        (tmp_path / "no.gguf", NotAModel),
    ):
        with pytest.raises(kind) as caught:
            load(path, config, overflow=True)
        assert_one_line(caught.value, str(path))
    with pytest.raises(BadLimits):
        load(packed, config, overflow=True, device_map="cpu")
    assert current() is None


def test_a_state_dict_in_memory_is_managed_too(config: Path) -> None:
    theirs = df.FluxTransformer2DModel.from_single_file(_weights(config), config=str(config))
    model = df.FluxTransformer2DModel.from_single_file(_weights(config), config=str(config), overflow=smallest(theirs))
    assert_same(run(model), run(theirs))


# ---- what we stand on: each of these fails where an upgrade of the host would break us


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(inspect.unwrap(getattr(function, "__func__", function))).parameters)


def test_diffusers_reads_single_files_by_the_functions_that_we_replace() -> None:
    note = "diffusers moved from_single_file; see plugins/overflowml_diffusers/host.py"
    for owner in (single_file_model.FromOriginalModelMixin, single_file.FromSingleFileMixin):
        raw_method = vars(owner)["from_single_file"]
        assert isinstance(raw_method, classmethod), note
        assert _parameters(raw_method)[1].startswith("pretrained_model_link_or_path"), note
    source = inspect.getsource(inspect.unwrap(single_file_model.FromOriginalModelMixin.from_single_file.__func__))
    for word in ("load_model_dict_into_meta(", "dispatch_model(", "keep_in_fp32_modules=", "hf_quantizer=", "dtype=torch_dtype"):
        assert word in source, f"{note}: {word}"
    reading = inspect.getsource(single_file_utils.load_single_file_checkpoint)
    assert "load_state_dict(pretrained_model_link_or_path" in reading, note
    assert _parameters(single_file_model.load_model_dict_into_meta)[:3] == ["model", "state_dict", "dtype"], note


def test_diffusers_packs_gguf_weights_as_we_read_them() -> None:
    from diffusers.quantizers.gguf import gguf_quantizer, utils

    note = "diffusers moved GGUFParameter; see plugins/overflowml_diffusers/packed.py"
    weight = utils.GGUFParameter(torch.zeros(2, 34, dtype=torch.uint8), quant_type=_Q8_0)
    assert (tuple(weight.quant_shape), weight.quant_type, type(weight.as_tensor())) == ((2, 32), _Q8_0, torch.Tensor), note
    assert _Q8_0 in utils.SUPPORTED_GGUF_QUANT_TYPES, note
    quantizer = gguf_quantizer.GGUFQuantizer
    assert _parameters(quantizer.check_quantized_param_shape) == ["self", "param_name", "current_param", "loaded_param"], note
    assert "modules_to_not_convert" in inspect.getsource(quantizer.create_quantized_param), note
