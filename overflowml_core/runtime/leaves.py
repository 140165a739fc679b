"""Blocks taken apart into their innermost modules, for budgets that hold no block whole. Reads the module tree only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from overflowml_core.runtime.structure import Structure, Unit, Weight, find_blocks

_MOST_LEAVES = 64
"""Of one block. A bank of experts in a module list has thousands; such a block is left whole."""


def leaf_units(block: Unit) -> tuple[Unit, ...]:
    """The innermost modules of a block that hold weights, each as a unit of its own, in the order in which they are registered.

    Weights of modules around them, and such as lie in several places, are in none: they have to be there as long as the block runs.

    Returns:
        Nothing where there are too many, or no weight would be in one.
    """
    if block.module is None:
        return ()
    leaves = [(path, module) for path, module in _leaf_modules(block.module)]
    if len(leaves) > _MOST_LEAVES:
        return ()
    place_of = {id(inner): place for place, (_, leaf) in enumerate(leaves) for inner in leaf.modules()}
    held: list[list[Weight]] = [[] for _ in leaves]
    for weight in block.weights:
        places = {place_of.get(id(owner.module)) for owner in weight.owners}
        place = places.pop()
        if place is not None and not places:
            held[place].append(weight)
    return tuple(Unit(f"{block.name}.{path}", leaf, tuple(own)) for (path, leaf), own in zip(leaves, held, strict=True) if own)


def _leaf_modules(block: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    inside: set[int] = set()
    for path, module in block.named_modules():
        if id(module) in inside or not path or next(module.parameters(), None) is None:
            continue
        # torch's attention computes with the weights of its output layer without calling it.
        is_whole = isinstance(module, nn.MultiheadAttention)
        if is_whole or all(next(child.parameters(), None) is None for child in module.children()):
            inside.update(id(inner) for inner in module.modules())
            yield path, module


def taken_apart(structure: Structure, placed: Iterable[str]) -> Structure:
    """The structure in the blocks that a plan places: those of which it places the leaves are taken apart, and what is in none of them is
    fixed.

    Args:
        structure: with whole blocks.
        placed: names of the blocks of the plan.
    """
    names = set(placed)
    blocks: list[Unit] = []
    loose: list[Weight] = []
    for unit in structure.blocks:
        leaves = () if unit.name in names else leaf_units(unit)
        if not leaves or leaves[0].name not in names:
            blocks.append(unit)
            continue
        blocks += leaves
        inside = {id(weight.parameter) for leaf in leaves for weight in leaf.weights}
        loose += [weight for weight in unit.weights if id(weight.parameter) not in inside]
    fixed = replace(structure.fixed, weights=(*structure.fixed.weights, *loose))
    return Structure(tuple(blocks), fixed, structure.buffers)


def modules_around(module: nn.Module, structure: Structure) -> Iterator[nn.Module]:
    """Blocks that were taken apart, and what is in them around their leaves.

    Args:
        module: a component.
        structure: of it, in the blocks that are placed.
    """
    placed = {id(unit.module) for unit in structure.blocks}
    for _, block in find_blocks(module):
        if id(block) not in placed:
            for inner in block.modules():
                if id(inner) not in placed and any(id(part) in placed for part in inner.modules()):
                    yield inner
