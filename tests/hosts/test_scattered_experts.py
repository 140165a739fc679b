"""Experts that a checkpoint holds one by one and the model as stacks: left unread, and the host's own values, reports and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from overflowml_core.facts import Limits
from overflowml_core.loading import Loading, loading
from overflowml_core.runtime.homes import FileMaps, original
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import lay_out
from overflowml_core.runtime.structure import dissect
from tests.hosts.check import copy_folder

EXPERTS = 12
"""More than ten: in the order of their names the eleventh comes behind the second."""

_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
_ROUTED = {**_LLAMA, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 4, "conv_kernel": 2, "chunk_size": 4}
_DENSE = {name: value for name, value in _ROUTED.items() if name not in ("num_hidden_layers", "intermediate_size")}

CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", lambda: tf.Qwen3MoeConfig(**_LLAMA, **_MOE)),
    "mixtral": ("MixtralForCausalLM", lambda: tf.MixtralConfig(**_LLAMA, num_local_experts=EXPERTS, num_experts_per_tok=2)),
    "deepseek_v3": ("DeepseekV3ForCausalLM", lambda: tf.DeepseekV3Config(**_ROUTED, **_GROUPS, **_LATENT)),
    "glm4_moe": ("Glm4MoeForCausalLM", lambda: tf.Glm4MoeConfig(**_ROUTED, **_GROUPS, head_dim=8)),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        lambda: tf.Qwen3NextConfig(**_LLAMA, **_MOE, **_LINEAR, shared_expert_intermediate_size=8),
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        lambda: tf.NemotronHConfig(
            **_DENSE, **_MAMBA, layers_block_type=["mamba", "moe", "attention", "moe"], head_dim=8, moe_shared_expert_intermediate_size=8
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        lambda: tf.GptOssConfig(**_LLAMA, num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=8),
    ),
}
"""gpt-oss is stored as stacks, transposed and with biases; Nemotron-H has no gate."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a model with values that nothing else has, once for all tests, and returns its folder."""
    folders: dict[str, Path] = {}

    def save(name: str, **options: Any) -> Path:
        key = f"{name} {options}"
        if key not in folders:
            torch.manual_seed(5)
            class_name, make = CONFIGS[name]
            model = getattr(tf, class_name)(make())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape))
            folders[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[key], **options)
        return folders[key]

    return save


def load(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The host's model and its report."""
    return getattr(tf, CONFIGS[name][0]).from_pretrained(folder, output_loading_info=True, **options)


def load_unread(name: str, folder: Path, **options: Any) -> tuple[Any, Any, Loading]:
    """The same in a load of ours, before anything is planned."""
    request = Loading(Limits())
    with loading(request):
        model, info = load(name, folder, **options)
    return model, info, request


def check(name: str, folder: Path, **options: Any) -> set[str]:
    """Load with and without us and compare values and reports.

    Returns:
        Names of the weights that lie in pieces.
    """
    torch.manual_seed(9)  # for what the host initializes
    theirs, their_info = load(name, folder, **options)
    torch.manual_seed(9)
    model, info, request = load_unread(name, folder, **options)
    assert info == their_info
    expected, scattered = dict(theirs.named_parameters()), set()
    names = {id(parameter): path for path, parameter in model.named_parameters()}
    assert list(names.values()) == list(expected)
    with FileReader() as reader:
        maps = FileMaps()
        for entry in (entry for unit in dissect(model).units for entry in lay_out(unit, request).entries):
            path = names[id(entry.weight.parameter)]
            values, other = original(entry, reader, maps), expected[path].detach()
            assert (values.dtype, values.shape) == (other.dtype, other.shape), path
            assert torch.equal(values, other), path
            if entry.scattered:
                scattered.add(path)
    return scattered


def stacks_of(model: Any) -> set[str]:
    return {path for path, parameter in model.named_parameters() if parameter.dim() == 3 and parameter.shape[0] == EXPERTS}


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_left_unread_and_have_the_hosts_values(name: str, folder_of: Callable[..., Path]) -> None:
    folder = folder_of(name)
    scattered = check(name, folder)
    model, _, _ = load_unread(name, folder)
    stacks = stacks_of(model)
    assert stacks
    assert all(model.get_parameter(path).is_meta for path in stacks)
    assert scattered == (set() if name == "gpt_oss" else stacks)


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "gpt_oss"])
def test_experts_in_another_dtype_are_converted_as_the_host_does(name: str, folder_of: Callable[..., Path]) -> None:
    assert bool(check(name, folder_of(name), dtype=torch.bfloat16)) is (name != "gpt_oss")


def test_experts_of_a_layer_may_lie_in_several_files(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("mixtral", max_shard_size="12KB")
    assert check("mixtral", folder)
    model, _, request = load_unread("mixtral", folder)
    paths = {origin.path for path in stacks_of(model) for origin in request.pieces_of(model.get_parameter(path))}
    assert len(paths) > 4


def test_pieces_of_an_expert_that_touch_each_other_are_one(folder_of: Callable[..., Path]) -> None:
    model, _, request = load_unread("qwen3_moe", folder_of("qwen3_moe"))
    experts = model.model.layers[0].mlp.experts
    # By name, down comes before gate and up, which lie side by side.
    assert {piece.nbytes for piece in request.pieces_of(experts.gate_up_proj)} == {2 * 8 * 16 * 4}
    assert {piece.nbytes for piece in request.pieces_of(experts.down_proj)} == {16 * 8 * 4}
    assert [len(request.pieces_of(weight)) for weight in (experts.gate_up_proj, experts.down_proj)] == [EXPERTS, EXPERTS]


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder = copy_folder(source, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


_EXPERT = "model.layers.1.mlp.experts.{}.{}.weight"


def _all_of_one(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        del tensors[_EXPERT.format(3, name)]


def _one_more(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[_EXPERT.format(EXPERTS, name)] = tensors[_EXPERT.format(3, name)]


def _one_larger(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_EXPERT.format(3, "up_proj")] = torch.zeros(9, 16)


def _all_larger(tensors: dict[str, torch.Tensor]) -> None:
    for number in range(EXPERTS):
        tensors[_EXPERT.format(number, "up_proj")] = torch.zeros(9, 16)


def _no_down(tensors: dict[str, torch.Tensor]) -> None:
    for number in range(EXPERTS):
        del tensors[_EXPERT.format(number, "down_proj")]


BROKEN: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "one half expert missing": lambda tensors: tensors.__delitem__(_EXPERT.format(3, "up_proj")),
    "one expert missing": _all_of_one,
    "one too many": _one_more,
    "one of another shape": _one_larger,
    "all of another shape": _all_larger,
    "a stack missing": _no_down,
}


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_bank_is_what_it_is_without_us(case: str, ignore: bool, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = rewrite(folder_of("qwen3_moe"), tmp_path, BROKEN[case])
    options = {"ignore_mismatched_sizes": ignore}
    theirs = _refusal(lambda: load("qwen3_moe", folder, **options))
    assert _refusal(lambda: load_unread("qwen3_moe", folder, **options)) == theirs
    is_converted = case not in ("one half expert missing", "one of another shape")
    assert bool(theirs) is (not is_converted or (not ignore and case != "a stack missing"))
    if not theirs:
        scattered = check("qwen3_moe", folder, **options)
        assert "model.layers.0.mlp.experts.gate_up_proj" in scattered  # the other layer is as it should be
        assert not scattered >= {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}


def _refusal(load: Callable[[], object]) -> str:
    """The last line of what the host says where it refuses; empty where it does not."""
    try:
        load()
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]
    return ""


def test_experts_of_mixed_dtypes_are_left_to_the_host(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = _EXPERT.format(3, "up_proj")
        tensors[name] = tensors[name].half()

    scattered = check("qwen3_moe", rewrite(folder_of("qwen3_moe"), tmp_path, change))
    assert "model.layers.1.mlp.experts.gate_up_proj" not in scattered
    assert "model.layers.1.mlp.experts.down_proj" in scattered


def test_experts_of_a_layer_that_the_model_lacks_are_reported(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.7.mlp.experts.0.up_proj.weight"] = torch.zeros(8, 16)
        tensors["model.layers.1.mlp.experts.0.other.weight"] = torch.zeros(8)

    folder = rewrite(folder_of("qwen3_moe"), tmp_path, change)
    assert check("qwen3_moe", folder)
    _, info, _ = load_unread("qwen3_moe", folder)
    assert {"model.layers.7.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.0.other.weight"} == set(info["unexpected_keys"])
