"""Takes blocks apart that a budget does not hold whole: into their innermost modules, which are streamed one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from overflowml_core.facts import Block, Component, Limits, Network, PassProfile
from overflowml_core.plan import Plan
from overflowml_core.planner.needs import phase_needs
from overflowml_core.units import format_bytes
from overflowml_core.work import BlockWork

_Apart = Callable[[Block], bool]


def finer(network: Network, limits: Limits, device_bytes: int) -> Network | None:
    """The network with as few blocks taken apart as a budget needs, the largest ones.

    Args:
        network: with whole blocks.
        limits: what the user grants.
        device_bytes: the budget.

    Returns:
        None where nothing has to be taken apart, or nothing can be. What is returned need not fit either: it is what takes least then.
    """
    components: list[Component] = []
    for need in phase_needs(network, limits):
        ways = [need.components]
        if need.smallest_bytes > device_bytes:
            sizes = sorted({block.slab_bytes for _, block in need.blocks if _divisible(block, need.components)}, reverse=True)
            ways += [_split_from(need.components, size) for size in sizes]
        taken = [_least_bytes(network, way, limits) for way in ways]
        fitting = next((way for way, nbytes in zip(ways, taken, strict=True) if nbytes <= device_bytes), None)
        components += fitting or ways[taken.index(min(taken))]
    made = replace(network, components=tuple(components))
    return None if made == network else made


def least_budget_bytes(network: Network, limits: Limits) -> int:
    """The smallest budget that holds every phase with one staging slot, blocks taken apart where that helps."""
    apart = finer(network, limits, 0) or network
    return max((need.smallest_bytes for need in phase_needs(apart, limits)), default=0)


def as_placed(network: Network, plan: Plan) -> Network:
    """The network in the blocks that a plan places."""
    names = {(place.component, place.block) for place in plan.placements()}

    def placed(component: Component) -> Component:
        return _apart(component, lambda block: (component.name, block.name) not in names and _leaves_in(component, block, names))

    return replace(network, components=tuple(placed(component) for component in network.components))


def sentence(network: Network, whole: Network) -> str:
    """What was taken apart, for the reasons of a plan."""
    for after, before in zip(network.components, whole.components, strict=True):
        if len(after.blocks) > len(before.blocks):
            kept = {block.name for block in after.blocks}
            split = [block for block in before.blocks if block.name not in kept]
            return (
                f"{before.name}: {len(split)} of {len(before.blocks)} blocks, of up to {format_bytes(max(b.slab_bytes for b in split))}, "
                f"do not fit whole; their {len(after.blocks) - len(before.blocks) + len(split)} innermost modules are streamed one by one"
            )
    return ""


def largest_leaf(network: Network, whole: Network) -> str:
    """The largest module that blocks were taken apart into, for the message of a budget that does not even hold that."""
    before = {(component.name, block.name) for component in whole.components for block in component.blocks}
    leaves = [(c, block) for c in network.components for block in c.blocks if (c.name, block.name) not in before]
    component, largest = max(leaves, key=lambda pair: pair[1].slab_bytes)
    return f"of blocks taken apart, {component.name}.{largest.name} alone takes {format_bytes(largest.slab_bytes)}: it cannot be split"


def _split_from(components: Iterable[Component], least_bytes: int) -> tuple[Component, ...]:
    """Components with all blocks of this size or more taken apart."""
    return tuple(_apart(component, lambda block: block.slab_bytes >= least_bytes) for component in components)


def _leaves_in(component: Component, block: Block, names: set[tuple[str, str]]) -> bool:
    return any((component.name, leaf.name) in names for leaf in block.leaves)


def _least_bytes(network: Network, components: Sequence[Component], limits: Limits) -> int:
    return max(need.smallest_bytes for need in phase_needs(replace(network, components=tuple(components)), limits))


def _divisible(block: Block, components: Iterable[Component]) -> bool:
    # A module that is called from two places would be in two blocks' leaves.
    tied = {other.tied_to for component in components for other in component.blocks}
    return bool(block.leaves) and block.tied_to is None and block.name not in tied


def _apart(component: Component, wanted: _Apart) -> Component:
    blocks: list[Block] = []
    split: list[bool] = []
    loose_bytes = loose_count = 0
    for block in component.blocks:
        split.append(_divisible(block, (component,)) and wanted(block))
        if not split[-1]:
            blocks.append(block)
            continue
        blocks += block.leaves
        loose_bytes += block.slab_bytes - sum(leaf.slab_bytes for leaf in block.leaves)
        loose_count += block.weight_count - sum(leaf.weight_count for leaf in block.leaves)
    if not any(split):
        return component

    def of_leaves(profiles: tuple[PassProfile, ...]) -> tuple[PassProfile, ...]:
        return tuple(replace(profile, blocks=_works(profile.blocks, component.blocks, split)) for profile in profiles)

    return replace(
        component,
        blocks=tuple(blocks),
        resident_bytes=component.resident_bytes + loose_bytes,
        resident_weight_count=component.resident_weight_count + loose_count,
        profiles=of_leaves(component.profiles),
        variants=tuple(replace(variant, profiles=of_leaves(variant.profiles)) for variant in component.variants),
    )


def _works(works: Sequence[BlockWork], blocks: Sequence[Block], split: Sequence[bool]) -> tuple[BlockWork, ...]:
    """Work of blocks and leaves. Nobody knows what each leaf computes: all of a block's work is put on its largest one."""
    if len(works) != len(blocks):
        return tuple(works)
    found: list[BlockWork] = []
    for work, block, apart in zip(works, blocks, split, strict=True):
        if not apart:
            found.append(work)
            continue
        largest = max(block.leaves, key=lambda leaf: leaf.slab_bytes)
        found += [work if leaf is largest else BlockWork(calls=work.calls) for leaf in block.leaves]
    return tuple(found)
