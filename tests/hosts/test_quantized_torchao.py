"""Models that their host quantizes by torchao, while it loads them or before: managed with the output of the unmanaged load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as df
import pytest
import torch
import transformers as tf
from torch import nn

import overflowml
from overflowml_core.errors import Unsupported
from overflowml_core.runtime.parts import parts_of
from tests.hosts.check import assert_one_line, assert_same, smallest
from tests.runtime.build import raw

torchao = pytest.importorskip("torchao.quantization")
_KINDS = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}
_IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of which the blocks are most."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str | None = None, **options: Any) -> Any:
    if kind is not None:
        options["quantization_config"] = tf.TorchAoConfig(_KINDS[kind]())
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def outputs(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        logits = model(_IDS).logits
    return [logits, model.generate(_IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)]


def stored_bytes(module: nn.Module) -> int:
    return sum(part.nbytes for parameter in module.parameters() for part in parts_of(parameter))


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Names, classes and bits of all weights."""
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert type(left[name]) is type(right[name]), name
        assert [(p.path, p.tensor.dtype, raw(p.tensor)) for p in parts_of(left[name])] == [
            (p.path, p.tensor.dtype, raw(p.tensor)) for p in parts_of(right[name])
        ], name


@pytest.mark.parametrize("kind", _KINDS)
def test_a_llama_that_is_quantized_while_it_is_loaded(kind: str, llama: Path) -> None:
    theirs = load(llama, kind)
    expected = outputs(theirs)
    limits = smallest(theirs)
    assert limits.device_bytes < stored_bytes(theirs) / 3
    model = load(llama, kind, overflow=limits)
    attachment = overflowml.attachment(model)
    assert attachment.plan.strategy == "stream"
    assert {placement.home.value for phase in attachment.plan.phases for placement in phase.placements} == {"disk"}
    assert_same(outputs(model), expected)
    same_state(model, theirs)
    assert overflowml.release(model)
    same_state(model, theirs)
    assert_same(outputs(model), expected)


def test_what_is_saved_while_managed_is_the_quantized_model(llama: Path, tmp_path: Path) -> None:
    theirs = load(llama, "int8")
    limits = smallest(theirs)
    load(llama, "int8", overflow=limits).save_pretrained(tmp_path)
    # What was saved quantized is loaded, planned and managed like any other model.
    model = load(tmp_path, overflow=limits)
    assert overflowml.attachment(model).plan.fingerprint == overflowml.plan(tmp_path, overflow=limits, dtype=torch.bfloat16).fingerprint
    assert_same(outputs(model), outputs(theirs))
    same_state(model, theirs)


def test_a_diffusers_transformer(saved_pipeline: Any) -> None:
    folder = saved_pipeline("flux", torch.bfloat16) / "transformer"
    options = {"quantization_config": df.TorchAoConfig(torchao.Int8WeightOnlyConfig()), "torch_dtype": torch.bfloat16}

    def run(model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(torch.bfloat16)

        with torch.no_grad():
            return model(
                hidden_states=random(1, 16, 4),
                encoder_hidden_states=random(1, 8, 32),
                pooled_projections=random(1, 32),
                timestep=torch.tensor([0.5]).to(torch.bfloat16),
                guidance=torch.tensor([3.0]).to(torch.bfloat16),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(8, 3),
            ).sample

    theirs = df.FluxTransformer2DModel.from_pretrained(folder, **options)
    model = df.FluxTransformer2DModel.from_pretrained(folder, overflow=smallest(theirs), **options)
    assert overflowml.attachment(model).plan.strategy == "stream"
    assert_same(run(model), run(theirs))
    same_state(model, theirs)
    overflowml.release(model)
    same_state(model, theirs)


# ---- what is refused


class Params4bit(nn.Parameter):
    """As bitsandbytes has them: bytes, and a state in an attribute that torch knows nothing of."""


def test_a_weight_of_an_unknown_class_is_refused_by_its_name(saved: Any) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"))
    layer = model.model.layers[0].mlp.up_proj
    layer._parameters["weight"] = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(Unsupported) as caught:
        overflowml.manage(model, "1GB")
    assert_one_line(caught.value, "model.layers.0.mlp.up_proj.weight", "Params4bit", "Linear", "TorchAoConfig")
    assert overflowml.attachment(model) is None


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quanto"])
def test_a_model_quantized_in_another_way_is_refused_by_its_name(method: str, saved: Any, saved_pipeline: Any) -> None:
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    for model in (
        tf.AutoModelForCausalLM.from_pretrained(saved("llama")),
        df.FluxTransformer2DModel.from_pretrained(saved_pipeline("flux") / "transformer"),
    ):
        model.hf_quantizer = quantizer
        with pytest.raises(Unsupported) as caught:
            overflowml.manage(model, "1GB")
        assert_one_line(caught.value, type(model).__name__, method, "TorchAoConfig")


@pytest.mark.usefixtures("nothing_left_behind")
def test_the_refusal_comes_before_anything_is_loaded(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    config = tf.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    monkeypatch.setattr(TorchAoHfQuantizer, "update_dtype", lambda self, dtype: _rename(self, dtype))
    loads: list[object] = []
    monkeypatch.setattr(TorchAoHfQuantizer, "postprocess_model", lambda self, model, **options: loads.append(model))
    with pytest.raises(Unsupported, match="quantized by quanto"):
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config, overflow=True)
    assert loads == []


def _rename(quantizer: Any, dtype: Any) -> Any:
    quantizer.quantization_config.quant_method = "quanto"
    return dtype
