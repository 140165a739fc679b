"""Takes routed experts out of the blocks of a plan that has them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from overflowml_core.codec import Codec
from overflowml_core.errors import PlanMismatch
from overflowml_core.facts import Network, Tier
from overflowml_core.formats import AS_STORED
from overflowml_core.plan import Placement, Plan
from overflowml_core.runtime.encode import codec_for
from overflowml_core.runtime.experts.bank import Bank, banks_of, without
from overflowml_core.runtime.structure import Structure, Unit


@dataclass(frozen=True, slots=True)
class Apart:
    """One bank that a plan has apart: where it belongs, where its experts wait, how many of them a token uses."""

    component: str
    unit: Unit
    bank: Bank
    tier: Tier
    per_token: int


def dense_format(place: Placement) -> str:
    """Name of the format of a block's own linear weights: where its experts are apart from it, the format that it is in is theirs alone."""
    return place.format if place.experts_home is None else AS_STORED


def take_out(
    structures: Mapping[str, Structure], plan: Plan, network: Network, codecs: Mapping[str, Codec]
) -> tuple[dict[str, Structure], list[Apart]]:
    """The structures without the experts that a plan has apart, and these.

    Args:
        structures: of the components by name, whole.
        plan: says which blocks have their experts apart.
        network: says how many experts a token uses.
        codecs: by name of the format, what converts experts that the plan has in one.

    Raises:
        PlanMismatch: a block has no experts that can be kept apart, or nobody converts into their format.
    """
    facts = {(c.name, block.name): block.experts for c in network.components for block in c.blocks if block.experts is not None}
    wanted = {(p.component, p.block): (p.experts_home, p.format) for p in plan.placements() if p.experts_home is not None}
    found: list[Apart] = []
    remaining: dict[str, Structure] = {}
    for name, structure in structures.items():
        blocks: list[Unit] = []
        for unit in structure.blocks:
            asked = wanted.pop((name, unit.name), None)
            if asked is not None:
                known = facts.get((name, unit.name))
                banks = banks_of(unit, known.count if known is not None else 0)
                if known is None or len(banks) != 1:
                    raise PlanMismatch(
                        f"{name}.{unit.name}: the plan has its experts apart, which this model's class does not allow; make a plan for it"
                    )
                bank = replace(banks[0], codec=codec_for(unit.name, asked[1], codecs))
                found.append(Apart(name, unit, bank, asked[0], known.per_token))
                unit = without(unit, banks)
            blocks.append(unit)
        remaining[name] = replace(structure, blocks=tuple(blocks))
    if wanted:
        component, block = next(iter(wanted))
        raise PlanMismatch(f"{component}.{block}: the plan has experts of this block, which this model does not have; make a plan for it")
    return remaining, found
