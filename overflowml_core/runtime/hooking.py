"""The forward hooks of a phase: what its modules do before and after they are called. Knows no plans and no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from overflowml_core.runtime.compiling import HookPair, Uncompiled, keep_out_of_graphs
from overflowml_core.runtime.gradients import refuse_gradients
from overflowml_core.runtime.leaves import modules_around
from overflowml_core.runtime.phase import Phase, Stay
from overflowml_core.runtime.structure import Structure

_NONE: Mapping[str, Any] = MappingProxyType({})


def hook_phase(
    phase: Phase, modules: Mapping[str, nn.Module], structures: Mapping[str, Structure], bring: Callable[[Phase], None], takes_turns: bool
) -> list[RemovableHandle | Uncompiled]:
    """Let the modules of a phase stream their blocks.

    Args:
        phase: whose modules they are.
        modules: its components by name.
        structures: of all components by name.
        bring: has a phase on the device; called where it is not.
        takes_turns: other phases may be on the device when one of the modules is called.

    Returns:
        What takes the hooks off again, but for those of blocks: see :func:`unhook_blocks`.
    """
    handles: list[RemovableHandle | Uncompiled] = []
    hook_blocks(phase, bring)

    # Hooks that are taken off while one before them waits are still called, and without keywords: torch forgot that they want them.
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NONE) -> None:
        if not phase.is_present:
            bring(phase)
        phase.streamer.begin_pass()
        refuse_gradients(module, args, kwargs)

    def ensure(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not phase.is_present:
            bring(phase)

    for hook in (begin, ensure):
        keep_out_of_graphs(hook)  # a graph would hold what was there, and whose thread it was, when it was made
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
        handles += [Uncompiled(part) for part in modules_around(module, structures[name])]
        if takes_turns:
            # Pipelines also call parts of a component by themselves (vae.decode, text_model.final_layer_norm).
            handles += [part.register_forward_pre_hook(ensure, prepend=True) for part in _owners(structures[name]) if part is not module]
    return handles


def hook_blocks(phase: Phase, bring: Callable[[Phase], None]) -> None:
    """Hook the streamed blocks of a phase, and no others from now on."""
    unhook_blocks(phase)
    for k, home in enumerate(phase.streamer.homes):
        if home.slab.unit.module is not None:
            phase.block_hooks.append(_hook_block(phase, k, home.slab.unit.module, bring))
            phase.block_hooks[-1].put_on()


def unhook_blocks(phase: Phase) -> None:
    """Take the hooks off the blocks of a phase."""
    while phase.block_hooks:
        phase.block_hooks[-1].remove()
        phase.block_hooks.pop()


def _hook_block(phase: Phase, k: int, module: nn.Module, bring: Callable[[Phase], None]) -> HookPair:
    # Through the phase, which has another streamer after a cast.

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NONE) -> None:
        if not phase.is_present:
            bring(phase)
            if phase.stay is Stay.AWAY:
                return  # given back while this call waited: it computes with plain weights
        refuse_gradients(module, args, kwargs)
        phase.streamer.wait(k)

    def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        phase.streamer.release(k)

    return HookPair(module, before, after)


def _owners(structure: Structure) -> Iterable[nn.Module]:
    """Modules that are called and must find their phase on the device: owners of fixed weights and buffers, and all blocks."""
    owners: dict[int, nn.Module] = {}
    for weight in structure.fixed.weights:
        owners.update((id(owner.module), owner.module) for owner in weight.owners)
    owners.update((id(module), module) for _, module, _ in structure.buffers)
    owners.update((id(unit.module), unit.module) for unit in structure.blocks if unit.module is not None)
    return owners.values()
