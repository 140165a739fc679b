"""Lists the classes with routed experts of the installed transformers, and writes docs/experts-models.md: which can have them kept apart.

    PYTHONPATH=.:plugins python tools/expert_models.py

Models are built by their configurations, shortened to a few layers, on the meta device: no weights are made or read.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "experts-models.md"

_LAYERS = 4
"""Enough for a layer with experts in every family: some begin with a few dense ones."""

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers", "num_decoder_layers")

_INTERFACE = re.compile(r"^@use_experts_implementation\b.*?^class (\w+)\(", re.M | re.S)
_LISTED = re.compile(r"^class (\w+Experts)\(nn\.Module(?:List|Dict)\)", re.M)
_CLASS = re.compile(r"^class (\w+)\(", re.M)
_COUNTS = re.compile(r"\b(?:num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts)\b")
_MENTIONS = 3
"""Of a count of experts, in model code that only passes it on to another family's."""

_MOE = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
_OCR = {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", *["sparse"] * 11]}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64, "indexer_compress_ratio": 4}
_SETTINGS: dict[str, dict[str, Any]] = {
    "DbrxConfig": {"attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0}},
    "DeepseekOcr2Config": {"text_config": _OCR},
    "DeepseekOcr2TextConfig": _OCR,
    "DeepseekV2Config": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "DiffusionGemmaTextConfig": _MOE,
    "DogeConfig": {"is_moe": True},
    "Dots1Config": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Gemma4TextConfig": {**_MOE, "enable_moe_block": True},
    "HunYuanMoEV1Config": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "NllbMoeConfig": {"num_experts": 8, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 64}},
    "Qwen4ExpTextConfig": _INDEXER,
    "VitPoseBackboneConfig": {"num_experts": 6, "part_features": 64},
}
"""By configuration class, what its defaults lack: they describe a model without experts, or none that can be built."""

_REASONS = {
    "DbrxExperts": "all experts lie in one matrix, which its forward cuts itself",
    "DogeCDMoE": "an expert is a row of an embedding: too little to be moved by itself",
    "Ernie4_5_VLMoeMoeExperts": "a block has two banks, for text and for images",
    "JetMoeParallelExperts": "its forward goes through all experts, used or not",
    "Llama4TextExperts": "its forward multiplies with the whole stack, whatever is routed",
    "LongcatFlashExperts": "reads its stacks in a forward of its own, not behind the experts interface",
    "Step3p7Experts": "reads its stacks in a forward of its own, not behind the experts interface",
    "VitPoseNaiveMoe": "one expert a data set, chosen by the caller: nothing is routed",
}
"""By class, why its experts stay with their blocks."""

_HEAD = """# Mixtures of experts in transformers

Made by `tools/expert_models.py` from transformers {version}; `tests/hosts/test_expert_classes.py` builds each class and holds it against
this page. Models that take their language model from another family, as most for images and text do, are like that family.

Where experts can be kept apart, they wait outside the device by themselves, and only those that are routed to come in; the rest of a
block stays. Where they cannot, their blocks are streamed whole, which is right and slower.

A bank is *stacked*, one tensor for all experts behind transformers' experts interface; or *listed*, a module for each expert; or a class's
*own*. On a CPU, outputs of stacked banks equal those of the host's `eager` and `grouped_mm` implementations bit for bit; where a class has
a gate of its own, within 1e-6 of them: there the last bit of an element depends on how many are computed at once.

Whatever its class, a bank stays with its block where its weights are quantized: those of torchao, and FP8 and MXFP4 ones that the host does
not decode while it loads them.

| experts | a model with them | bank | kept apart |
|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Family:
    """A folder of transformers with routed experts.

    Attributes:
        name: of the folder.
        module: dotted name of its model code.
        experts: its classes of experts that are known; none where nobody has said which they are.
    """

    name: str
    module: str
    experts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """What the page says about one class: itself, a model that has it, how its experts lie, and why they cannot be kept apart (or "")."""

    experts: str
    model: str
    bank: str
    reason: str

    def __str__(self) -> str:
        return f"| `{self.experts}` | `{self.model}` | {self.bank} | {'no: ' + self.reason if self.reason else 'yes'} |"


def families() -> Iterator[Family]:
    """All families of the installed transformers whose code counts experts, by name."""
    import transformers

    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "xpert" not in text:
            continue
        found = _INTERFACE.findall(text) if "@use_experts_implementation" in text else []
        found += [name for name in _CLASS.findall(text) if name in _REASONS and name not in found]
        found += _LISTED.findall(text)
        if found or len(_COUNTS.findall(text)) > _MENTIONS:
            yield Family(path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}", tuple(found))


def models_of(family: Family) -> Iterator[Any]:
    """The family's models on the meta device, those that generate first, as far as their configurations build one."""
    import torch
    from transformers import PreTrainedModel

    module = importlib.import_module(family.module)
    classes = [found for name in module.__all__ if isinstance(found := getattr(module, name, None), type)]
    classes = [c for c in classes if issubclass(c, PreTrainedModel) and not c.__name__.endswith("PreTrainedModel")]
    # Old names of a class are subclasses of it.
    for cls in sorted(classes, key=lambda c: (not c.__name__.endswith("ForCausalLM"), any(base in classes for base in c.__mro__[1:]))):
        try:
            config = cls.config_class(**_SETTINGS.get(cls.config_class.__name__, {}))
            shorten(config)
            with torch.device("meta"):
                yield cls(config)
        except (AttributeError, TypeError, ImportError):
            continue  # a part of a larger model, one without defaults, or one that needs a package that is not there


def shorten(config: Any) -> None:
    """Leave a few layers of every part of a configuration."""
    from transformers import PreTrainedConfig

    values = vars(config)
    for value in list(values.values()):
        if isinstance(value, PreTrainedConfig):
            shorten(value)
    for name in _LAYER_COUNTS:
        count = values.get(name)
        if isinstance(count, int) and count > _LAYERS:
            for key, value in list(values.items()):
                if isinstance(value, (list, tuple)) and len(value) == count:
                    setattr(config, key, type(value)(value[:_LAYERS]))
            setattr(config, name, _LAYERS)


def rows_of(family: Family) -> list[tuple[Row, Any]]:
    """What the page says about a family, each with a module of that class.

    Raises:
        LookupError: it has experts that nobody has described here, or none of its models can be built.
    """
    from overflowml_core.runtime.component import describe_module

    if not family.experts:
        raise LookupError(f"{family.name}: counts experts, and no class of them is known; add it to _REASONS in tools/expert_models.py")
    found: list[tuple[Row, Any]] = []
    wanted = set(family.experts)
    for model in models_of(family):
        modules = {type(module).__name__: module for module in model.modules()}
        here = sorted(wanted & modules.keys())
        if here:
            blocks = describe_module(model, "model").blocks
            separable = any(block.experts is not None and block.experts.separable for block in blocks)
            for name in here:
                if not separable and name not in _REASONS:
                    raise LookupError(f"{name}: its experts cannot be kept apart; say why in _REASONS in tools/expert_models.py")
                row = Row(name, type(model).__name__, _bank(modules[name]), "" if separable else _REASONS[name])
                found.append((row, modules[name]))
                wanted.discard(name)
        if not wanted:
            return found
    raise LookupError(f"{', '.join(sorted(wanted))}: no model with it could be built; add to _SETTINGS in tools/expert_models.py")


def _bank(module: Any) -> str:
    from torch import nn

    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return "listed"
    if not hasattr(module, "is_transposed"):
        return "own"
    words = ["stacked", *(word for flag, word in _FLAGS.items() if getattr(module, flag, False))]
    if not module.has_gate:
        words.append("no gate")
    elif has_own_gate(module):
        words.append("own gate")
    return ", ".join(words)


def has_own_gate(module: Any) -> bool:
    """Whether a class behind the interface says itself what is done between its matrices."""
    from transformers.integrations.moe import use_experts_implementation

    return type(module)._apply_gate.__module__ != use_experts_implementation.__module__


_FLAGS = {"has_bias": "bias", "is_transposed": "transposed", "has_post_expert_norm": "norm"}


def page(rows: Iterable[Row]) -> str:
    """The whole page."""
    import transformers

    return _HEAD.format(version=transformers.__version__) + "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(row for family in families() for row, _ in rows_of(family)), encoding="utf-8")
