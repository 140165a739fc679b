"""Uninstalling leaves the hosts as they were; and what must stay true in the hosts for us to work at all."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import transformers as tf
from diffusers.loaders import single_file as df_single_file
from diffusers.loaders import single_file_model as df_single_file_model
from diffusers.loaders import single_file_utils as df_single_file_utils
from diffusers.models import modeling_utils as df_models
from diffusers.pipelines import pipeline_utils as df_pipelines
from transformers import modeling_utils as tf_models

import overflowml
from overflowml_core.errors import OverflowmlError
from overflowml_core.loading import current
from tests.hosts import models
from tests.hosts.check import assert_same, smallest

Saved = Callable[..., Path]
_TRANSFORMERS = "transformers moved {}; see plugins/overflowml_transformers/{}.py"
_DIFFUSERS = "diffusers moved {}; see plugins/overflowml_diffusers/{}.py"


def _places() -> dict[str, Any]:
    """Everything that we replace, as it stands in the owner's own dictionary."""
    import transformers.pipelines as tf_pipelines

    return {
        "PreTrainedModel.from_pretrained": vars(tf_models.PreTrainedModel)["from_pretrained"],
        "PreTrainedModel._load_pretrained_model": vars(tf_models.PreTrainedModel)["_load_pretrained_model"],
        "transformers.pipelines.pipeline": tf_pipelines.pipeline,
        # Not tf.pipeline: importing the pipelines puts another module in the place of "transformers".
        "transformers.pipeline": sys.modules["transformers"].pipeline,
        "Pipeline.__init__": vars(tf_pipelines.Pipeline)["__init__"],
        "DiffusionPipeline.from_pretrained": vars(df_pipelines.DiffusionPipeline)["from_pretrained"],
        "ModelMixin.from_pretrained": vars(df_models.ModelMixin)["from_pretrained"],
        "ModelMixin._load_pretrained_model": vars(df_models.ModelMixin)["_load_pretrained_model"],
        "single_file_utils.load_state_dict": df_single_file_utils.load_state_dict,
        "FromOriginalModelMixin.from_single_file": vars(df_single_file_model.FromOriginalModelMixin)["from_single_file"],
        "single_file_model.load_model_dict_into_meta": df_single_file_model.load_model_dict_into_meta,
        "single_file_model.dispatch_model": df_single_file_model.dispatch_model,
        "FromSingleFileMixin.from_single_file": vars(df_single_file.FromSingleFileMixin)["from_single_file"],
    }


@pytest.fixture
def bare() -> Iterator[dict[str, Any]]:
    """The hosts without us; what they are is compared again at the end."""
    overflowml.uninstall()
    before = _places()
    yield before
    overflowml.uninstall()
    after = _places()
    assert {name for name in before if before[name] is not after[name]} == set()


def test_install_replaces_and_uninstall_gives_back_the_identical_objects(bare: dict[str, Any]) -> None:
    dictionaries = (tf_models.PreTrainedModel, df_models.ModelMixin, df_pipelines.DiffusionPipeline, tf.Pipeline)
    keys = [list(vars(owner)) for owner in dictionaries]
    finders = list(sys.meta_path)
    for _ in range(3):
        overflowml.install()
        installed = _places()
        assert [name for name in bare if installed[name] is bare[name]] == []
        overflowml.uninstall()
        assert all(value is bare[name] for name, value in _places().items())
    assert [list(vars(owner)) for owner in dictionaries] == keys
    assert sys.meta_path == finders


def test_second_install_and_second_uninstall_do_nothing(bare: dict[str, Any]) -> None:
    overflowml.install()
    once = _places()
    overflowml.install()
    assert all(value is once[name] for name, value in _places().items())
    overflowml.uninstall()
    overflowml.uninstall()
    assert all(value is bare[name] for name, value in _places().items())


def test_replacements_look_like_the_originals(bare: dict[str, Any]) -> None:
    overflowml.install()
    for name, value in _places().items():
        theirs, ours = getattr(bare[name], "__func__", bare[name]), getattr(value, "__func__", value)
        assert type(value) is type(bare[name]), name
        assert inspect.signature(ours) == inspect.signature(theirs), name
        assert (ours.__name__, ours.__qualname__, ours.__module__, ours.__doc__) == (
            theirs.__name__,
            theirs.__qualname__,
            theirs.__module__,
            theirs.__doc__,
        )


def test_managed_model_outlives_uninstall(saved: Saved) -> None:
    folder = saved("llama")
    expected = models.call("llama", tf.AutoModelForCausalLM.from_pretrained(folder))
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=smallest(folder))
    overflowml.uninstall()
    assert_same(models.call("llama", model), expected)
    with pytest.raises(TypeError):
        tf.AutoModelForCausalLM.from_pretrained(folder, overflow=True)
    assert overflowml.release(model)
    assert_same(models.call("llama", model), expected)


def test_plan_and_manage_work_without_the_hosts_installed(saved: Saved, bare: dict[str, Any]) -> None:
    folder = saved("llama")
    limits = smallest(folder)
    assert overflowml.plan(folder, overflow=limits).strategy == "stream"
    assert all(value is bare[name] for name, value in _places().items())
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert overflowml.manage(model, limits).plan.strategy == "stream"


def test_what_somebody_else_patched_over_us_is_left_alone(caplog: pytest.LogCaptureFixture, saved: Saved, bare: dict[str, Any]) -> None:
    overflowml.install()
    ours = vars(tf_models.PreTrainedModel)["from_pretrained"]
    calls: list[object] = []

    def theirs(cls: type, *args: Any, **kwargs: Any) -> Any:
        calls.append(cls)
        return ours.__func__(cls, *args, **kwargs)

    stranger = classmethod(theirs)
    tf_models.PreTrainedModel.from_pretrained = stranger
    try:
        with caplog.at_level(logging.WARNING, "overflowml"):
            overflowml.uninstall()
        assert any("PreTrainedModel.from_pretrained" in record.getMessage() for record in caplog.records)
        assert vars(tf_models.PreTrainedModel)["from_pretrained"] is stranger
        assert tf.AutoModelForCausalLM.from_pretrained(saved("llama")) is not None
        overflowml.install()
        model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=smallest(saved("llama")))
        assert overflowml.attachment(model) is not None
        assert calls
        overflowml.uninstall()
        assert vars(tf_models.PreTrainedModel)["from_pretrained"] is stranger
    finally:
        tf_models.PreTrainedModel.from_pretrained = bare["PreTrainedModel.from_pretrained"]


@pytest.mark.parametrize("missing", ["from_pretrained", "_load_pretrained_model"])
def test_host_that_moved_is_left_alone_whole(missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No half of the patches without the other, and no failed import of the host on our account."""
    overflowml.uninstall()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "overflowml"):
        patched.delattr(tf_models.PreTrainedModel, missing)
        others = {name: value for name, value in vars(tf_models.PreTrainedModel).items() if name.endswith("_pretrained")}
        overflowml.install()
        assert all(vars(tf_models.PreTrainedModel)[name] is value for name, value in others.items())
        assert any(missing in record.getMessage() and "transformers" in record.getMessage() for record in caplog.records)
        overflowml.uninstall()


def test_failed_load_leaves_no_request_behind(saved: Saved) -> None:
    with pytest.raises(OverflowmlError):
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=overflowml.Limits.exactly(device_memory=1, reserve=0))
    assert current() is None
    assert overflowml.attachment(tf.AutoModelForCausalLM.from_pretrained(saved("llama"))) is None


# ---- what we stand on: each of these fails where an upgrade of a host would break us


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(getattr(function, "__func__", function)).parameters)


def test_transformers_loads_models_by_from_pretrained(bare: dict[str, Any]) -> None:
    raw = bare["PreTrainedModel.from_pretrained"]
    note = _TRANSFORMERS.format("PreTrainedModel.from_pretrained", "host")
    assert isinstance(raw, classmethod), note
    assert _parameters(raw)[:2] == ["cls", "pretrained_model_name_or_path"], note
    source = inspect.getsource(inspect.unwrap(raw.__func__))
    for word in ("_load_pretrained_model(", "output_loading_info", 'kwargs.pop("device_map"', 'kwargs.pop("max_memory"'):
        assert word in source, _TRANSFORMERS.format(word, "host")


def test_transformers_reads_weights_in_load_pretrained_model(bare: dict[str, Any]) -> None:
    raw = bare["PreTrainedModel._load_pretrained_model"]
    note = _TRANSFORMERS.format("PreTrainedModel._load_pretrained_model", "host")
    assert isinstance(raw, staticmethod), note
    assert _parameters(raw)[:4] == ["model", "state_dict", "checkpoint_files", "load_config"], note
    assert "get_slice" in inspect.getsource(raw.__func__), _TRANSFORMERS.format("the lazy slices of a state dict", "defer")


@pytest.mark.parametrize("field", ["hf_quantizer", "weight_mapping", "dtype_plan", "device_map"])
def test_transformers_load_config_has_the_fields_that_we_read(field: str) -> None:
    fields = getattr(tf_models.LoadStateDictConfig, "__dataclass_fields__", {})
    assert field in fields, _TRANSFORMERS.format(f"LoadStateDictConfig.{field}", "defer")


def test_transformers_renames_keys_as_we_call_it() -> None:
    from transformers import core_model_loading as core

    names = _parameters(core.rename_source_key)
    assert names[:5] == ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"], (
        _TRANSFORMERS.format("rename_source_key", "defer")
    )
    target, pattern = core.rename_source_key("a.b", [], [], "", {})
    assert (target, pattern) == ("a.b", None), _TRANSFORMERS.format("the answer of rename_source_key", "defer")
    for name in ("WeightConverter", "WeightRenaming"):
        assert inspect.isclass(getattr(core, name, None)), _TRANSFORMERS.format(name, "defer")


def test_transformers_matches_globs_as_we_call_it() -> None:
    from transformers import core_model_loading as core

    pattern, by_group, _ = core.build_glob_alternation(["wo", "norm.*"])
    match = pattern.search("layer.wo.weight")
    note = _TRANSFORMERS.format("build_glob_alternation", "defer")
    assert match is not None, note
    assert by_group[match.lastgroup] == "wo", note


def test_transformers_says_what_is_loaded_and_tied(saved: Saved) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama_tied"))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}, _TRANSFORMERS.format(
        "all_tied_weights_keys", "defer"
    )
    assert model.base_model_prefix == "model", _TRANSFORMERS.format("base_model_prefix", "defer")
    note = _TRANSFORMERS.format("the mark _is_hf_initialized", "defer")
    assert "_is_hf_initialized" in inspect.getsource(tf_models), note
    fields = inspect.signature(tf_models.LoadStateDictInfo).parameters
    assert "missing_keys" in fields, _TRANSFORMERS.format("LoadStateDictInfo.missing_keys", "host")


def test_transformers_pipeline_gives_model_kwargs_to_the_model(bare: dict[str, Any]) -> None:
    note = _TRANSFORMERS.format("pipeline", "host")
    names = _parameters(bare["transformers.pipelines.pipeline"])
    assert names[:2] == ["task", "model"], note
    assert "model_kwargs" in names, note
    assert _parameters(bare["Pipeline.__init__"])[:2] == ["self", "model"], _TRANSFORMERS.format("Pipeline.__init__", "host")


def test_diffusers_loads_by_from_pretrained(bare: dict[str, Any]) -> None:
    for name in ("DiffusionPipeline.from_pretrained", "ModelMixin.from_pretrained"):
        note = _DIFFUSERS.format(name, "host")
        assert isinstance(bare[name], classmethod), note
        assert _parameters(bare[name])[:2] == ["cls", "pretrained_model_name_or_path"], note


def test_diffusers_reads_weights_in_load_pretrained_model(bare: dict[str, Any]) -> None:
    raw = bare["ModelMixin._load_pretrained_model"]
    note = _DIFFUSERS.format("ModelMixin._load_pretrained_model", "host")
    assert isinstance(raw, classmethod), note
    names = _parameters(raw)
    assert names[:4] == ["cls", "model", "state_dict", "resolved_model_file"], note
    for keyword in ("hf_quantizer", "low_cpu_mem_usage", "dtype", "keep_in_fp32_modules"):
        assert keyword in names, f"{keyword}: {note}"
    call = inspect.getsource(inspect.unwrap(bare["ModelMixin.from_pretrained"].__func__)).split("._load_pretrained_model(")[1]
    for keyword in ("hf_quantizer=", "low_cpu_mem_usage=", "dtype=", "keep_in_fp32_modules="):
        assert keyword in call, f"{keyword} is not given by name: {note}"


def test_diffusers_asks_hf_hook_for_the_device_and_before_a_decorated_call() -> None:
    from diffusers.utils import accelerate_utils

    source = inspect.getsource(df_pipelines.DiffusionPipeline._execution_device.fget)  # type: ignore[attr-defined]
    for word in ("_hf_hook", "execution_device"):
        assert word in source, _DIFFUSERS.format(f"{word} in DiffusionPipeline._execution_device", "attach")
    source = inspect.getsource(accelerate_utils.apply_forward_hook)
    for word in ("_hf_hook", "pre_forward(self)"):
        assert word in source, _DIFFUSERS.format(f"{word} in apply_forward_hook", "attach")


def test_diffusers_pipelines_name_the_order_of_their_components() -> None:
    for name in ("FluxPipeline", "StableDiffusionXLPipeline", "WanPipeline", "StableDiffusion3Pipeline"):
        assert "->" in (getattr(df, name).model_cpu_offload_seq or ""), _DIFFUSERS.format("model_cpu_offload_seq", "describe")
    assert isinstance(df_pipelines.DiffusionPipeline.components, property), _DIFFUSERS.format("DiffusionPipeline.components", "describe")


@pytest.mark.parametrize(
    "method",
    ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "remove_all_hooks", "reset_device_map"],
)
def test_diffusers_pipelines_have_the_methods_that_we_guard(method: str) -> None:
    assert callable(getattr(df_pipelines.DiffusionPipeline, method, None)), _DIFFUSERS.format(f"DiffusionPipeline.{method}", "attach")
