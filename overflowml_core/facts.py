"""What is: networks, workloads and limits, as frozen values (machines have a file of their own). Knows nothing of how they were found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from overflowml_core.errors import BadLimits
from overflowml_core.machine import Accelerator, ComputeRate, HostMemory, Machine, Rates
from overflowml_core.units import parse_bytes
from overflowml_core.work import BlockWork, PassProfile, Variant, Work

__all__ = [
    "QUALITIES",
    "Accelerator",
    "Block",
    "BlockWork",
    "Bytes",
    "Component",
    "ComputeRate",
    "Experts",
    "HostMemory",
    "Limits",
    "Linear",
    "Machine",
    "Network",
    "PassProfile",
    "Rates",
    "TensorFact",
    "Tier",
    "Variant",
    "Work",
    "Workload",
    "digest",
    "network_fingerprint",
    "tensors_fingerprint",
]


class Tier(str, Enum):
    """Where a block's weights lie between two uses.

    DEVICE: resident in the memory that computes (a GPU's, or RAM under the budget on a machine without one).
    PINNED: in page-locked RAM, which the copy engine reads at full link rate; occupies RAM that cannot be swapped.
    RAM: in pageable RAM; copies from it are slower and stall the host.
    DISK: in a file (the model's own, or a packed copy); occupies no memory but a staging slot while it runs.
    """

    DEVICE = "device"
    PINNED = "pinned"
    RAM = "ram"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class TensorFact:
    """One weight of a model: dotted name, shape in elements, dtype as safetensors spells it ("BF16"), size in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a block (a bank of feed-forward networks of which a token uses a few).

    Attributes:
        count: experts in the bank.
        nbytes: bytes of the record of one expert, alignment included.
        per_token: experts that a token is routed to.
        dense_bytes: slab bytes of the block without its routed experts; 0 where nobody laid them out.
        separable: experts can wait apart from their block. Not those of classes that read the whole stack in a forward of their own.
        heat: share of the tokens that go to each expert, ``per_token`` in all, where a run was recorded; else empty.
        matrices: of one expert, those that formats may convert, by their shapes; empty where nobody knows them.
        runs: what caches of earlier runs found, in passes of single tokens.
    """

    count: int
    nbytes: int
    per_token: int
    dense_bytes: int = 0
    separable: bool = True
    heat: tuple[float, ...] = ()
    matrices: tuple[Linear, ...] = ()
    runs: tuple[CacheRun, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheRun:
    """What the cache of a run found, over all banks that shared it, in passes of single tokens.

    Attributes:
        slots: experts that it had room for.
        requests: experts that were asked for, each once a pass.
        hits: of them, those that had stayed.
    """

    slots: int
    requests: int
    hits: int


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights of linear layers that look alike, and that formats may convert.

    Attributes:
        rows, columns: outputs and inputs of the layer, in elements.
        dtype: as safetensors spells it ("BF16").
        count: how many there are.
    """

    rows: int
    columns: int
    dtype: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a component that is moved as one: a transformer layer, a stage of a UNet.

    Attributes:
        name: dotted path of the module inside its component.
        weight_count: elements, each tied tensor once.
        stored_bytes: bytes of its tensors as they are loaded.
        slab_bytes: bytes of the flat buffer that holds them, alignment included.
        bytes_by_dtype: (dtype, bytes) pairs, sorted.
        tied_to: name of the block whose tensors these are, where the same module is called twice.
        keep_format: never quantize.
        linear_count: elements of the weights of linear layers, the only ones that formats convert.
        linears: the same weights by their shapes, sorted; empty where only their number is known.
        experts: its routed experts, None in a dense block.
        leaves: its innermost modules with weights, in the order in which they are registered; what it is taken apart into where a budget
            does not hold it whole. Weights of modules around them stay outside. Empty where it is not taken apart.
    """

    name: str
    weight_count: int
    stored_bytes: int
    slab_bytes: int
    bytes_by_dtype: tuple[tuple[str, int], ...] = ()
    tied_to: str | None = None
    keep_format: bool = False
    linear_count: int = 0
    experts: Experts | None = None
    leaves: tuple[Block, ...] = ()
    linears: tuple[Linear, ...] = ()


@dataclass(frozen=True, slots=True)
class Component:
    """A module of a network that runs as one: the transformer, a text encoder, the VAE.

    Attributes:
        name: its attribute in the pipeline; "model" for a model that stands alone.
        class_name: class of the module.
        blocks: in order of execution.
        resident_bytes: slab bytes of all weights outside the blocks; they are on the device while the component runs.
        resident_weight_count: elements outside the blocks.
        bytes_by_dtype: (dtype, bytes) pairs over all weights, tied ones once.
        phase: components of the same phase run interleaved and share the budget at the same time.
        passes: how often the component runs per unit of work (denoising steps, tokens).
        activation_bytes: peak of activations and caches while it runs, over all of its passes.
        activation_source: "measured" (in a host that ran it), "traced" (the real code ran on fake tensors), "analytic" or "none".
        fingerprint: over names, shapes and dtypes of all tensors.
        profiles: its passes at the workload, in the order in which they first happen; empty where nobody profiled it.
        variants: ways of running it that take less memory, the least costly first.
    """

    name: str
    class_name: str
    blocks: tuple[Block, ...]
    resident_bytes: int
    resident_weight_count: int
    bytes_by_dtype: tuple[tuple[str, int], ...]
    phase: str
    passes: int = 1
    activation_bytes: int = 0
    activation_source: str = "none"
    fingerprint: str = ""
    profiles: tuple[PassProfile, ...] = ()
    variants: tuple[Variant, ...] = ()

    @property
    def slab_bytes(self) -> int:
        """Bytes of the component on the device when all of it is resident."""
        return self.resident_bytes + sum(block.slab_bytes for block in self.blocks)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its tensors, without alignment."""
        return sum(nbytes for _, nbytes in self.bytes_by_dtype)

    @property
    def content(self) -> str:
        """Fingerprint of what the blocks hold, in bytes by dtype and in order: the same in every host that loads these weights, and for
        their file, whatever each of them calls the blocks and their tensors."""
        return digest(
            [[list(pair) for pair in block.bytes_by_dtype] for block in self.blocks] or [list(pair) for pair in self.bytes_by_dtype]
        )

    @property
    def weight_count(self) -> int:
        """Elements of its tensors, tied ones once."""
        return self.resident_weight_count + sum(block.weight_count for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Network:
    """A model or pipeline as the planner sees it: components in the order in which they run.

    Attributes:
        components: in order of execution; equal phases stand together.
        source: where it was described from, for people.
        class_name: class of the model or pipeline.
        fingerprint: over the components; independent of ``source``, so that every host gives the same one.
    """

    components: tuple[Component, ...]
    source: str
    class_name: str
    fingerprint: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without alignment."""
        return sum(component.weight_bytes for component in self.components)

    def phases(self) -> tuple[tuple[str, tuple[Component, ...]], ...]:
        """The phases in order, each with its components."""
        order: dict[str, list[Component]] = {}
        for component in self.components:
            order.setdefault(component.phase, []).append(component)
        return tuple((name, tuple(members)) for name, members in order.items())


@dataclass(frozen=True, slots=True)
class Workload:
    """What the model will be asked to do; None where nobody said. Sizes in pixels, frames, images and tokens."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int = 1
    steps: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadLimits(f"{field.name}={value!r}: a workload counts in whole numbers from 1; leave it out if you do not know it")


class Bytes(int):
    """A size that was read already, and is not held against what a person would write."""


QUALITIES = ("lossless", "minimal", "any")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user grants and asks for.

    Sizes may be given as text ("8GB", "512MiB") and are bytes afterwards.

    Attributes:
        device_memory: budget of the compute tier in bytes, everything included; None takes what is free.
        host_memory: RAM for weights that wait outside the device, in bytes; None takes what the system can spare.
        reserve: bytes of the device budget kept for activations and caches; None lets the plan estimate them.
        allow_disk: weights may stay on disk.
        quality: "lossless" changes no weight; "minimal" permits FP8 and INT8 of weights alone, and tiles of a VAE; "any" permits all
            formats. What is lossless wins where it is not more than 3 % slower. None, where nobody said, is "lossless" for what is loaded
            and "minimal" for a forecast, which changes nothing.
        excluded: (format, tier) pairs that may not be used; ("", "*") demands that a format is.
        trial: whether other plans are run during the first passes, and the fastest is kept: None does so where another one is predicted to
            take no more than a quarter longer, True always, False never. No part of the decision.

    Raises:
        BadSize: a size cannot be read.
        BadLimits: fields contradict each other.
    """

    device_memory: int | str | None = None
    host_memory: int | str | None = None
    reserve: int | str | None = None
    allow_disk: bool = True
    quality: str | None = None
    excluded: frozenset[tuple[str, str]] = frozenset()
    trial: bool | None = None

    def __post_init__(self) -> None:
        for name in ("device_memory", "host_memory", "reserve"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Bytes):
                none_reserved = name == "reserve" and value == 0 and not isinstance(value, (bool, str))
                object.__setattr__(self, name, Bytes(0 if none_reserved else parse_bytes(value, name)))
        if not isinstance(self.allow_disk, bool):
            raise BadLimits(f"allow_disk={self.allow_disk!r}: give True or False")
        if self.trial is not None and not isinstance(self.trial, bool):
            raise BadLimits(f"trial={self.trial!r}: give True, False, or None for a trial where plans are close")
        if self.quality is not None and self.quality not in QUALITIES:
            raise BadLimits(f"quality={self.quality!r}: not one of {', '.join(QUALITIES)}")
        if self.device_bytes is not None and self.reserve_bytes is not None and self.reserve_bytes >= self.device_bytes:
            raise BadLimits(
                f"reserve={self.reserve_bytes} bytes: not smaller than device_memory={self.device_bytes} bytes; "
                "lower one or raise the other"
            )

    @property
    def device_bytes(self) -> int | None:
        """``device_memory`` as bytes."""
        return None if self.device_memory is None else int(self.device_memory)

    @property
    def host_bytes(self) -> int | None:
        """``host_memory`` as bytes."""
        return None if self.host_memory is None else int(self.host_memory)

    @property
    def reserve_bytes(self) -> int | None:
        """``reserve`` as bytes."""
        return None if self.reserve is None else int(self.reserve)

    @classmethod
    def exactly(cls, device_memory: int | None = None, host_memory: int | None = None, reserve: int | None = None, **others: Any) -> Limits:
        """Limits from sizes in bytes as another Limits gave them, small ones too."""
        device, host, kept = (None if size is None else Bytes(size) for size in (device_memory, host_memory, reserve))
        return cls(device_memory=device, host_memory=host, reserve=kept, **others)

    @classmethod
    def of(cls, request: object, what: str = "overflow") -> Limits:
        """Read what a user wrote after ``overflow=``.

        Args:
            request: True, a size, a Limits, or a mapping of Limits' fields.
            what: name of the argument, for messages.

        Raises:
            BadSize: a size that cannot be read.
            BadLimits: anything else that is none of these.
        """
        if request is True:
            return cls()
        if isinstance(request, Limits):
            return request
        if isinstance(request, (int, str)) and not isinstance(request, bool):
            return cls(device_memory=parse_bytes(request, what))
        if isinstance(request, Mapping):
            known = {field.name for field in fields(cls)}
            unknown = sorted(str(key) for key in request if key not in known)
            if unknown:
                raise BadLimits(f"{what}: unknown field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
            return cls(**request)
        raise BadLimits(f"{what}={request!r}: give True, a size such as '8GB', or overflowml.Limits(device_memory='8GB')")


def digest(value: object) -> str:
    """A stable fingerprint: the first 16 hex digits of SHA-256 over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensors_fingerprint(class_name: str, tensors: Iterable[TensorFact]) -> str:
    """Fingerprint of a component: its class and every tensor's name, shape and dtype, in any order."""
    return digest([class_name, sorted([t.name, list(t.shape), t.dtype] for t in tensors)])


def network_fingerprint(components: Iterable[Component]) -> str:
    """Fingerprint of a network: name, phase and fingerprint of each component, in order.

    The class of a pipeline stays out: text to image and image to image over the same components need the same plan.
    """
    return digest([[c.name, c.phase, c.fingerprint] for c in components])
