"""What each phase of a network asks of the compute tier: bytes per block in a format, activations in a variant. Decides on no block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from overflowml_core.facts import Block, Component, Limits, Network, PassProfile
from overflowml_core.formats import AS_STORED, Format
from overflowml_core.planner.conversion import Weight, weigh


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to weights: a format, and the components that it is for.

    Attributes:
        format: None leaves all weights as they are stored.
        components: names of those that are converted.
    """

    format: Format | None = None
    components: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Name of the format; empty where weights stay as stored."""
        return AS_STORED if self.format is None else self.format.name

    @property
    def loss(self) -> str:
        """What it does to the result, as ``Limits.quality`` has it."""
        return "lossless" if self.format is None else self.format.loss


AS_IS = Recipe()


@dataclass(frozen=True, slots=True)
class PhaseNeed:
    """What one phase asks of the compute tier.

    Attributes:
        name: the phase.
        components: its components, in order.
        fixed_bytes: slabs of all weights outside blocks; they are resident while the phase runs.
        activation_bytes: kept free for activations and caches.
        blocks: (component, block) in order of execution.
        sizes_bytes: what each block takes of the device; 0 where it is tied to another.
        owners: index of the block whose tensors each one uses: its own, or that of the block it is tied to.
        weights: each block in its format.
        profiles: the passes of each component, in the variant that is switched on.
        variant: its name; empty where components run as they are.
        lossless: whether the variant leaves the result as it is.
        decoding_bytes: of ``activation_bytes``, what decoding a converted weight takes for a moment.
    """

    name: str
    components: tuple[Component, ...]
    fixed_bytes: int
    activation_bytes: int
    blocks: tuple[tuple[str, Block], ...]
    sizes_bytes: tuple[int, ...]
    owners: tuple[int, ...]
    weights: tuple[Weight, ...]
    profiles: tuple[tuple[PassProfile, ...], ...]
    variant: str = ""
    lossless: bool = True
    decoding_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """Slabs of all its weights."""
        return self.fixed_bytes + sum(self.sizes_bytes)

    @property
    def whole_bytes(self) -> int:
        """Compute tier it takes with every weight resident."""
        return self.weight_bytes + self.activation_bytes

    @property
    def smallest_bytes(self) -> int:
        """Compute tier it takes at least: every block streamed through one slot."""
        return self.fixed_bytes + max(self.sizes_bytes, default=0) + self.activation_bytes

    @property
    def passes(self) -> int:
        """How often its most frequent component runs per unit of work."""
        return max((component.passes for component in self.components), default=1)


def phase_needs(network: Network, limits: Limits, recipe: Recipe = AS_IS) -> tuple[PhaseNeed, ...]:
    """What each phase of a network needs, in the order in which they run, with all components as they are."""
    return tuple(_phase_need(name, components, limits, recipe) for name, components in network.phases())


def _phase_need(name: str, components: tuple[Component, ...], limits: Limits, recipe: Recipe) -> PhaseNeed:
    blocks: list[tuple[str, Block]] = []
    owners: list[int] = []
    weights: list[Weight] = []
    for component in components:
        first = len(blocks)
        blocks += [(component.name, block) for block in component.blocks]
        owners += [first + index for index in _owners(component.blocks)]
        chosen = recipe.format if component.name in recipe.components else None
        weights += [weigh(block, chosen) for block in component.blocks]
    profiles = tuple(component.profiles for component in components)
    # A reserve that was asked for is all that is kept free.
    decoding = max((weight.workspace_bytes for weight in weights), default=0) if limits.reserve_bytes is None else 0
    return PhaseNeed(
        name=name,
        components=components,
        fixed_bytes=sum(component.resident_bytes for component in components),
        activation_bytes=activation_bytes(components, profiles, limits) + decoding,
        blocks=tuple(blocks),
        sizes_bytes=tuple(weight.slab_bytes if owners[i] == i else 0 for i, weight in enumerate(weights)),
        owners=tuple(owners),
        weights=tuple(weights),
        profiles=profiles,
        decoding_bytes=decoding,
    )


def in_variant(need: PhaseNeed, device_bytes: int, limits: Limits) -> PhaseNeed:
    """The phase in the variant that its budget needs; as it is where it needs none, or where none helps.

    A variant is switched on only where the phase does not fit whole as it is. One that leaves the result as it is comes before the
    streaming of blocks, for it costs less; one that does not comes after everything else, and whether it is permitted is judged later.

    Args:
        need: the phase with all components as they are.
        device_bytes: the budget.
        limits: which variants may be used.
    """
    if need.whole_bytes <= device_bytes or limits.reserve_bytes is not None:
        return need
    lossless, lossy = _variants(need, limits)
    for group in ((need, *lossless), lossy):
        for way in group:
            if way.whole_bytes <= device_bytes:
                return way
        for way in group:
            if way.smallest_bytes <= device_bytes:
                return way
    return need


def _variants(need: PhaseNeed, limits: Limits) -> tuple[list[PhaseNeed], list[PhaseNeed]]:
    """The phase in each variant of the first of its components that has any: those without loss, and the others."""
    ways: tuple[list[PhaseNeed], list[PhaseNeed]] = ([], [])
    place = next((i for i, component in enumerate(need.components) if component.variants), None)
    if place is None:
        return ways
    for variant in need.components[place].variants:
        if ("variant", variant.name) in limits.excluded:
            continue
        profiles = (*need.profiles[:place], variant.profiles, *need.profiles[place + 1 :])
        activations = activation_bytes(need.components, profiles, limits) + need.decoding_bytes
        way = replace(need, profiles=profiles, activation_bytes=activations, variant=variant.name, lossless=variant.lossless)
        ways[not variant.lossless].append(way)
    return ways


def _owners(blocks: Sequence[Block]) -> list[int]:
    index_of = {block.name: index for index, block in enumerate(blocks)}
    owners = []
    for index in range(len(blocks)):
        seen, owner = {index}, index
        # Ties may be chained. One that leads nowhere or round in a circle is no tie: the block then counts with its own bytes.
        while (name := blocks[owner].tied_to) is not None:
            owner = index_of.get(name, index)
            if owner in seen:
                owner = index
                break
            seen.add(owner)
        owners.append(owner)
    return owners


def activation_bytes(components: Sequence[Component], profiles: Sequence[Sequence[PassProfile]], limits: Limits) -> int:
    """Bytes that a phase keeps free for activations and caches: the reserve asked for, else the most that a component takes.

    Args:
        components: of the phase.
        profiles: their passes; a component without any is taken at its word.
        limits: with the reserve.
    """
    if limits.reserve_bytes is not None:
        return limits.reserve_bytes
    return max((_most_bytes(component, passes) for component, passes in zip(components, profiles, strict=True)), default=0)


def _most_bytes(component: Component, passes: Sequence[PassProfile]) -> int:
    return max((profile.activation_bytes for profile in passes), default=component.activation_bytes)


def together_bytes(needs: Sequence[PhaseNeed]) -> int:
    """Compute tier that all phases take when no weight ever leaves it; activations take turns."""
    return sum(need.weight_bytes for need in needs) + max((need.activation_bytes for need in needs), default=0)
