"""What the passes of a live model of the host take, by the names and shapes of its weights. Runs no code of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from overflowml_core.facts import Component, Network, TensorFact, Workload
from overflowml_core.inspect.image_shapes import family_of, image_component
from overflowml_core.inspect.tensor_groups import ComponentName
from overflowml_core.runtime.component import weight_facts
from overflowml_core.runtime.structure import DTYPE_NAMES


def with_profiles(network: Network, module: Any, workload: Workload) -> Network | None:
    """The network of one live module with its passes; None where its weights are those of no known family.

    Args:
        network: as the core describes the module: one component.
        module: the module itself.
        workload: pixels, frames, batch and steps.
    """
    component = network.components[0]
    guess = image_component(ComponentName(component.name, ""), _whole_weights(module), workload)
    if not guess.profiles:
        return None
    return replace(network, components=(_joined(component, guess), *network.components[1:]))


def _whole_weights(module: Any) -> list[TensorFact]:
    """The weights by the shapes that they compute with and the bytes that they take: a quantized one is one weight, not its parts."""
    weights: dict[str, Any] = dict(module.named_parameters())
    whole: dict[str, TensorFact] = {}
    for part in weight_facts(module):
        name = part.name.partition(" (")[0]  # its kind stands behind it
        weight = weights.get(name)
        if name == part.name or weight is None:
            whole[part.name] = part
            continue
        nbytes = part.nbytes + (whole[name].nbytes if name in whole else 0)
        whole[name] = TensorFact(name, tuple(weight.shape), DTYPE_NAMES.get(weight.dtype, part.dtype), nbytes)
    return list(whole.values())


def samples_of(module: Any, batch: int) -> int:
    """Images or videos in a planned pass: twice the batch where the family is guided by a second prompt.

    Args:
        module: a live one of the host.
        batch: that was asked.
    """
    family = family_of(weight_facts(module))
    return batch * (2 if family is not None and family.guided else 1)


def _joined(component: Component, guess: Component) -> Component:
    """The component with the passes of its twin. Both name their blocks alike; their order may differ, and the module's counts."""
    places = {block.name: index for index, block in enumerate(guess.blocks)}
    names = [block.name for block in component.blocks]
    if set(names) == set(places):
        profiles = tuple(
            replace(profile, blocks=tuple(profile.blocks[places[name]] for name in names)) if profile.blocks else profile
            for profile in guess.profiles
        )
    else:  # what the model takes is known, not where: no seconds are better than those of other blocks
        profiles = ()
    return replace(
        component,
        passes=guess.passes,
        activation_bytes=guess.activation_bytes,
        activation_source="analytic",
        profiles=profiles,
    )
