"""Networks and machines of a line each. Bytes everywhere, unless a name ends in _mib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from overflowml_core.facts import (
    Accelerator,
    Block,
    Component,
    HostMemory,
    Limits,
    Machine,
    Network,
    Rates,
    network_fingerprint,
)

MIB = 2**20
GIB = 2**30


def block(name: str, nbytes: int, tied_to: str | None = None) -> Block:
    held = 0 if tied_to else nbytes
    return Block(name=name, weight_count=held // 2, stored_bytes=held, slab_bytes=held, bytes_by_dtype=(("BF16", held),), tied_to=tied_to)


def component(name: str, sizes: Sequence[int], fixed: int = 0, activations: int = 0, **changes: Any) -> Component:
    """A component whose blocks have these sizes, in bytes."""
    made = Component(
        name=name,
        class_name=name.title(),
        blocks=tuple(block(f"layers.{i}", size) for i, size in enumerate(sizes)),
        resident_bytes=fixed,
        resident_weight_count=fixed // 2,
        bytes_by_dtype=(("BF16", fixed + sum(sizes)),),
        phase=name,
        activation_bytes=activations,
        activation_source="analytic" if activations else "none",
        fingerprint=f"{name}-{len(sizes)}-{sum(sizes)}",
    )
    return replace(made, **changes)


def network(*components: Component, name: str = "Model") -> Network:
    return Network(components=components, source=name, class_name=name, fingerprint=network_fingerprint(components))


def machine(
    device: int | None = 16 * GIB,
    host: int = 64 * GIB,
    *,
    pinnable: int | None = None,
    disk: int = 2**42,
    unified: bool = False,
    measured: bool = False,
) -> Machine:
    """A machine with so many bytes free; ``device=None`` has no accelerator."""
    gpu = () if device is None else (Accelerator("mps" if unified else "cuda", "Test GPU", 0, device, device, unified, "test"),)
    return Machine(
        accelerators=gpu,
        host=HostMemory(host, host, host // 2 if pinnable is None else pinnable, 8),
        rates=Rates(25e9, 25e9, 5e9, "measured" if measured else "assumed"),
        disk_free_bytes=disk,
    )


def llm(layers: int = 32, layer: int = 416 * MIB, fixed: int = 2 * GIB, activations: int = 512 * MIB) -> Network:
    return network(component("model", [layer] * layers, fixed, activations), name="Llama")


def flux() -> Network:
    """The sizes of FLUX.1-dev in bfloat16: 19 double and 38 single blocks."""
    return network(
        component("text_encoder", [14 * MIB] * 12, 73 * MIB, 8 * MIB),
        component("text_encoder_2", [369 * MIB] * 24, 251 * MIB, 92 * MIB),
        component("transformer", [648 * MIB] * 19 + [270 * MIB] * 38, 129 * MIB, 468 * MIB, passes=28),
        component("vae", [], 160 * MIB, 1537 * MIB),
        name="FluxPipeline",
    )


def granted(nbytes: int, **changes: Any) -> Limits:
    """Limits with a device budget of so many bytes, however small: sizes below 1 MiB are only taken with a unit."""
    return Limits(device_memory=f"{nbytes}B", **changes)
