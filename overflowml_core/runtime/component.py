"""A module as the planner sees it: the facts of its blocks, of their leaves, and of what lies outside them.

Reads shapes and dtypes only, as ``structure`` does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from overflowml_core.facts import Block, Component, Experts, Linear, TensorFact, tensors_fingerprint
from overflowml_core.layout import align, slab_bytes
from overflowml_core.runtime.experts.bank import Bank, banks_of, without
from overflowml_core.runtime.leaves import leaf_units
from overflowml_core.runtime.linears import linears_of
from overflowml_core.runtime.parts import Part, is_known, is_plain, label, parts_of
from overflowml_core.runtime.structure import DTYPE_NAMES, Structure, Unit, Weight, dissect, walk_parameters


def weight_facts(module: nn.Module) -> tuple[TensorFact, ...]:
    """Every parameter once, by the first name that holds it; a quantized one by its parts, which carry its kind in their names. Takes
    parameters of every kind, such as those of a trace."""
    seen: set[int] = set()
    facts: list[TensorFact] = []
    for path, _, _, parameter in walk_parameters(module):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        kind = label(parameter)
        for part in parts_of(parameter) if is_known(parameter) else (Part((), parameter),):
            name = ".".join((f"{path} ({kind})" if kind else path, *part.path))
            facts.append(TensorFact(name, tuple(part.tensor.shape), _dtype_name(part.tensor), part.nbytes))
    return tuple(facts)


def _described(unit: Unit) -> Block:
    return Block(
        name=unit.name,
        weight_count=sum(w.weight_count for w in unit.weights),
        stored_bytes=sum(w.nbytes for w in unit.weights),
        slab_bytes=unit.slab_bytes,
        bytes_by_dtype=_by_dtype(unit.weights),
        linear_count=sum(w.weight_count for w in unit.weights if w.convertible),
        linears=linears_of((w.parameter for w in unit.weights if w.convertible), DTYPE_NAMES),
    )


def describe_module(
    module: nn.Module,
    name: str,
    phase: str | None = None,
    activation_bytes: int = 0,
    activation_source: str = "none",
) -> Component:
    """A module as the planner sees it.

    Args:
        module: loaded or on the meta device.
        name: what the component is called.
        phase: which components it shares the budget with at the same time; its own name by default.
        activation_bytes: peak of activations and caches while it runs.
        activation_source: where that number comes from.

    Raises:
        Unsupported: a parameter is of a class that cannot be taken apart.
    """
    structure = dissect(module)
    routing = _routing(module)
    blocks = tuple(
        replace(_described(unit), experts=_experts(unit, routing), leaves=tuple(_described(leaf) for leaf in leaf_units(unit)))
        for unit in structure.blocks
    )
    everything = [weight for unit in structure.units for weight in unit.weights]
    return Component(
        name=name,
        class_name=type(module).__name__,
        blocks=blocks,
        resident_bytes=structure.fixed.slab_bytes + _buffer_bytes(structure) + _decoding_bytes(everything),
        resident_weight_count=sum(w.weight_count for w in structure.fixed.weights),
        bytes_by_dtype=_by_dtype(everything),
        phase=phase or name,
        activation_bytes=activation_bytes,
        activation_source=activation_source,
        fingerprint=tensors_fingerprint(type(module).__name__, weight_facts(module)),
    )


_DECODING_BYTES = 8
"""Of memory for each weight of a layer whose weights are decoded for every call: the decoded copy and what the decoding holds on its way,
at most two tensors in float32 (torchao 0.18 float8 on a CPU; diffusers 0.42 dequantize_functions take 4 to 8)."""


def _decoding_bytes(weights: list[Weight]) -> int:
    """Kept free beside the fixed weights: traces see the layers of a quantized model compute with plain weights."""
    return align(_DECODING_BYTES * max((w.weight_count for w in weights if not is_plain(w.parameter)), default=0))


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
"""What configs call the size of a bank and how many of it a token uses (transformers 5.23, models/*/configuration_*.py)."""

_FIXED_PER_TOKEN = {"switch_transformers": 1, "nllb-moe": 2}
"""By model type: experts that a token uses where the class says so and no configuration does (SwitchTransformersTop1Router,
NllbMoeTop2Router)."""


def _routing(module: nn.Module) -> tuple[int, int] | None:
    """Experts in a bank and experts for a token, by the module's configuration; None where it names none."""
    config = getattr(module, "config", None)
    inner = getattr(config, "get_text_config", None)
    config = inner() if callable(inner) else config
    count, per_token = _first_count(config, _EXPERT_COUNTS), _first_count(config, _EXPERTS_PER_TOKEN)
    per_token = per_token or _FIXED_PER_TOKEN.get(getattr(config, "model_type", ""), 0)
    return (count, per_token) if count > 1 and 0 < per_token <= count else None


def _first_count(config: object, names: tuple[str, ...]) -> int:
    return next((count for name in names if (count := _count_of(config, name)) > 0), 0)


def _count_of(config: object, name: str) -> int:
    """A count of a configuration, the largest where it differs by layer; 0 where it names none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # a configuration that differs by layer (transformers' HeterogeneousConfigMixin) does not answer for all of them
        value = [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", ())]
    values = value if isinstance(value, (list, tuple)) else (value,)
    return max((one for one in values if isinstance(one, int) and not isinstance(one, bool)), default=0)


def _experts(unit: Unit, routing: tuple[int, int] | None) -> Experts | None:
    """The routed experts of a block. Where they cannot be kept apart from it, or are several banks, they are counted by their shapes."""
    if routing is None or unit.module is None:
        return None
    count, per_token = routing
    banks = banks_of(unit, count)
    if len(banks) == 1 and banks[0].count >= per_token:
        bank = banks[0]
        return Experts(bank.count, bank.record_bytes, per_token, without(unit, banks).slab_bytes, matrices=_matrices(bank))
    inside = {id(weight): weight.nbytes for weight in _inseparable(unit, unit.module, count)}
    nbytes = sum(inside.values())
    if not nbytes:
        return None
    dense = slab_bytes(part.nbytes for weight in unit.weights if id(weight) not in inside for part in weight.parts)
    return Experts(count, nbytes // count, per_token, dense, separable=False)


def _matrices(bank: Bank) -> tuple[Linear, ...]:
    """The matrices of one expert that formats may convert, by shape and dtype, sorted."""
    dtypes = (DTYPE_NAMES.get(weight.parameter.dtype, str(weight.parameter.dtype)) for weight in bank.weights_of(0))
    counts = Counter((*shape, dtype) for shape, dtype in zip(bank.matrices, dtypes, strict=True) if shape is not None)
    return tuple(Linear(rows, columns, dtype, count) for (rows, columns, dtype), count in sorted(counts.items()))


def _inseparable(unit: Unit, module: nn.Module, count: int) -> list[Weight]:
    """Weights of routed experts by their shapes: stacked along the first dimension of 3-D weights, or of modules in a list as long."""
    stacked = {id(w.owners[0].module) for w in unit.weights if w.parameter.dim() == 3 and w.parameter.shape[0] == count}
    if stacked:
        # Biases of stacked experts lie beside them, and have the same first dimension.
        return [w for w in unit.weights if id(w.owners[0].module) in stacked and w.parameter.shape[:1] == (count,)]
    lists = (inner for inner in module.modules() if isinstance(inner, (nn.ModuleList, nn.ModuleDict)) and len(inner) == count)
    listed = {id(parameter) for inner in lists for parameter in inner.parameters()}
    return [w for w in unit.weights if id(w.parameter) in listed]


def _buffer_bytes(structure: Structure) -> int:
    """Device bytes of the buffers, each one aligned as an allocation of its own."""
    total = 0
    for _, module, attribute in structure.buffers:
        buffer = module._buffers[attribute]
        if buffer is not None:
            total += align(buffer.numel() * buffer.element_size())
    return total


def _by_dtype(weights: list[Weight] | tuple[Weight, ...]) -> tuple[tuple[str, int], ...]:
    totals: dict[str, int] = {}
    for part in (part for weight in weights for part in weight.parts):
        name = _dtype_name(part.tensor)
        totals[name] = totals.get(name, 0) + part.nbytes
    return tuple(sorted(totals.items()))


def _dtype_name(tensor: torch.Tensor) -> str:
    return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
