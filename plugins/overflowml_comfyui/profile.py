"""What the passes of a live model of the host take, by the names and shapes of its weights. Runs no code of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from overflowml_core.facts import Component, Network, Workload
from overflowml_core.inspect.image_shapes import image_component
from overflowml_core.inspect.tensor_groups import ComponentName
from overflowml_core.runtime.component import weight_facts


def with_profiles(network: Network, module: Any, workload: Workload) -> Network | None:
    """The network of one live module with its passes; None where its weights are those of no known family.

    Args:
        network: as the core describes the module: one component.
        module: the module itself.
        workload: pixels, frames, batch and steps.
    """
    component = network.components[0]
    guess = image_component(ComponentName(component.name, ""), weight_facts(module), workload)
    if not guess.profiles:
        return None
    return replace(network, components=(_joined(component, guess), *network.components[1:]))


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
