"""Small models with routed experts, and plans that have the experts apart, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from overflowml_core.expert_setting import ExpertSetting
from overflowml_core.facts import Limits, Network, Tier, Workload, network_fingerprint
from overflowml_core.layout import slab_bytes
from overflowml_core.loading import Loading
from overflowml_core.plan import Budget, Estimate, PhasePlan, Placement, Plan
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.engine import Engine
from overflowml_core.runtime.experts.seat import slot_bytes
from tests.runtime.build import PLENTY


def qwen3_moe(seed: int = 0, **changes: Any) -> Any:
    """A Qwen3-MoE of the real class: 4 layers, 16 experts of which a token uses 4."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**options, **changes}))
    return model.eval().requires_grad_(False)


def network_of(module: nn.Module) -> Network:
    components = (describe_module(module, "model"),)
    return Network(components, "test", "Test", network_fingerprint(components))


def expert_plan(network: Network, device: Device, slots: int, tier: Tier) -> Plan:
    """All dense parts on the device, and a cache of so many experts."""
    component = network.components[0]
    placements, largest = [], 0
    for block in component.blocks:
        bank = block.experts
        stored = block.slab_bytes if bank is None else bank.dense_bytes
        largest = max(largest, 0 if bank is None else bank.nbytes)
        placements.append(Placement("model", block.name, Tier.DEVICE, Tier.DEVICE, stored, experts_home=None if bank is None else tier))
    cache_bytes = slots * slot_bytes(largest, device.on_host)
    phase = PhasePlan(
        "model", ("model",), component.resident_bytes, Tier.DEVICE, 0, 0, 0, tuple(placements), Estimate(), expert_cache_bytes=cache_bytes
    )
    name = device.torch_device.type
    return Plan(
        strategy="experts",
        network="test",
        network_fingerprint=network.fingerprint,
        weight_bytes=network.weight_bytes,
        device=name,
        device_name=name,
        workload=Workload(),
        limits=Limits(),
        budget=Budget(PLENTY, PLENTY, PLENTY),
        phases=(phase,),
        estimate=Estimate(),
    )


def attach(
    module: nn.Module,
    device: Device,
    folder: Path,
    slots: int = 12,
    tier: Tier = Tier.PINNED,
    loading: Loading | None = None,
    setting: ExpertSetting | None = None,
) -> Engine:
    """An engine at work on a model, which is switched to it as its host would do."""
    network = network_of(module)
    plan = expert_plan(network, device, slots, tier)
    engine = Engine(plan, network, device, folder, experts=setting).attach({"model": module}, loading)
    if engine.experts.callers():
        from overflowml_transformers.experts import take_over

        engine.on_detach(take_over(module, engine))
    return engine


def record_bytes(*shapes: tuple[int, ...], itemsize: int = 4) -> int:
    sizes = []
    for shape in shapes:
        size = itemsize
        for length in shape:
            size *= length
        sizes.append(size)
    return slab_bytes(sizes)
