"""Weights that are converted into a format on their way to the slab: one at a time, from a file or from the model's own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from overflowml_core.codec import Codec
from overflowml_core.errors import PlanMismatch
from overflowml_core.formats import AS_STORED
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.parts import Path, parameter_over, parts_of
from overflowml_core.runtime.slab import Entry, Slab, lay_out
from overflowml_core.runtime.structure import DTYPE_NAMES, Structure, Unit, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedWeight(Weight):
    """A weight in a format. ``parameter`` has the converted weight's class, shape and parts, and no data.

    Attributes:
        plain: the weight as it was, laid out alone; tells where its values come from.
        device: where the model had it.
        codec: converts it.
    """

    plain: Entry
    device: torch.device
    codec: Codec

    @property
    def recipe(self) -> str:
        """Names the conversion and its version: bytes that were made by another recipe are other bytes."""
        return f"{self.codec.format.name}:{self.codec.version}"

    def encode(self, values: torch.Tensor) -> dict[Path, torch.Tensor]:
        """The parts of the converted weight.

        Args:
            values: of the weight as it was, rows by columns.
        """
        with torch.no_grad():
            return {part.path: part.tensor for part in parts_of(self.codec.encode(values.detach()))}

    @property
    def is_due(self) -> bool:
        """Whether it is still to be converted, and is not a converted one that took another's place."""
        return bool(self.parameter.is_meta)

    def put_aside(self) -> None:
        """Let the weight's own data wait in RAM while the converted one stands in for it: it would take the room that was to be saved."""
        parameter = self.plain.weight.parameter
        if not parameter.is_meta and parameter.device.type != "cpu":
            parameter.data = parameter.data.to("cpu")

    def given_back(self, values: Callable[[Entry], torch.Tensor]) -> nn.Parameter:
        """The weight as it was: the model's own parameter where it had data, else one over the values of its file.

        Args:
            values: reads a weight that lies in a file.
        """
        parameter = self.plain.weight.parameter
        if parameter.is_meta:
            return parameter_over(parameter, {(): values(self.plain)})
        if parameter.device != self.device:
            parameter.data = parameter.data.to(self.device)
        return parameter


def encoded(structure: Structure, formats: Mapping[str, str], codecs: Mapping[str, Codec], loading: Loading | None) -> Structure:
    """The structure with the weights of its blocks in the formats of a plan. Nothing is read or converted yet.

    Args:
        structure: as the model is.
        formats: name of the format by name of the block; of blocks that are not named nothing is converted.
        codecs: by name of the format.
        loading: knows where weights without data are to be read; None where all have data.

    Raises:
        PlanMismatch: nobody converts into a format.
    """
    blocks = tuple(_encoded(unit, formats.get(unit.name, AS_STORED), codecs, loading) for unit in structure.blocks)
    return replace(structure, blocks=blocks)


def _encoded(unit: Unit, name: str, codecs: Mapping[str, Codec], loading: Loading | None) -> Unit:
    codec = codec_for(unit.name, name, codecs)
    if codec is None:
        return unit
    return replace(unit, weights=tuple(_encoded_weight(weight, codec, loading) for weight in unit.weights))


def codec_for(block: str, name: str, codecs: Mapping[str, Codec]) -> Codec | None:
    """What converts into the format that a plan has a block in; None where it stays as it is stored.

    Args:
        block: its name, for messages.
        name: of the format.
        codecs: by name of the format.

    Raises:
        PlanMismatch: nobody converts into it.
    """
    codec = codecs.get(name)
    if codec is None and name != AS_STORED:
        raise PlanMismatch(f"{block}: the plan has it in {name}, into which no plugin converts weights here; make a plan on this machine")
    return codec if name != AS_STORED else None


def _encoded_weight(weight: Weight, codec: Codec, loading: Loading | None) -> Weight:
    parameter = weight.parameter
    dtype = DTYPE_NAMES.get(parameter.dtype, "")
    if not weight.convertible or not codec.format.converts(parameter.shape[0], parameter.shape[1], dtype):
        return weight
    (plain,) = lay_out(Unit(weight.name, None, (weight,)), loading).entries
    with torch.no_grad():
        like = nn.Parameter(codec.template(parameter.shape[0], parameter.shape[1], parameter.dtype), requires_grad=False)
    return EncodedWeight(weight.name, like, weight.owners, plain=plain, device=parameter.device, codec=codec)


def show_originals(structures: Mapping[str, Structure], values: Callable[[Entry], torch.Tensor]) -> list[Any]:
    """Have ``state_dict`` of the modules show weights as they were, and ``save_pretrained`` save them: a converted weight is a stand-in.

    Args:
        structures: with converted weights.
        values: reads a weight that lies in a file.

    Returns:
        Handles; ``remove`` takes each one back.
    """
    return [
        owner.module.register_state_dict_post_hook(_original(weight, owner.attribute, values))
        for structure in structures.values()
        for unit in structure.blocks
        for weight in unit.weights
        if isinstance(weight, EncodedWeight)
        for owner in weight.owners
    ]


def _original(weight: EncodedWeight, attribute: str, values: Callable[[Entry], torch.Tensor]) -> Callable[..., None]:
    def show(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        parameter = weight.plain.weight.parameter
        if f"{prefix}{attribute}" in state:
            state[f"{prefix}{attribute}"] = values(weight.plain) if parameter.is_meta else parameter.detach()

    return show


def sources_of(entry: Entry) -> tuple[Origin, ...]:
    """Where the values of an entry lie in files, converted or not, piece by piece; empty where the model itself has them."""
    if isinstance(entry.weight, EncodedWeight):
        # One that somebody edited after it was converted is no longer what its file has.
        return entry.weight.plain.origins if entry.weight.is_due else ()
    return entry.origins


def recipe_of(slab: Slab) -> str:
    """What is done to the weights of a slab on their way, with its version; empty where nothing is converted."""
    made = {(entry.weight.recipe, str(entry.weight.plain.dtype)) for entry in slab.entries if isinstance(entry.weight, EncodedWeight)}
    return " ".join(f"{recipe} from {dtype}" for recipe, dtype in sorted(made))
