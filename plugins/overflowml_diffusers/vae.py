"""A VAE under a trace, taken apart: its encoder, its decoder and the seams of its tiles are traced once for each size, what is around them
as often as it happens. Videos are decoded frame by frame and tiles by the hundred, all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils._pytree import tree_unflatten

from overflowml_core.facts import BlockWork, Work
from overflowml_core.runtime.fake import Call, Tracer
from overflowml_diffusers.cast import Casts
from overflowml_diffusers.replay import Known, Replay, fake_of, rebuild

METHODS = ("encode", "decode")
"""What pipelines call of a VAE; its forward is for training."""

_MODULES = ("encoder", "decoder")
_SEAMS = ("blend_v", "blend_h", "blend_t")
"""Methods of diffusers' VAEs that join two tiles, row by row."""

_CALL = "call_"


def is_vae(module: object) -> bool:
    """Whether pipelines call methods ``encode`` and ``decode`` of a module in place of itself."""
    kind = type(module).__name__
    return ("Autoencoder" in kind or "VAE" in kind or "VQ" in kind) and callable(getattr(module, "decode", None))


class TracedVae:
    """Watches a twin of a VAE.

    Args:
        name: of the component.
        module: a twin, not watched yet.
        tracer: the trace under way.

    Attributes:
        replays: by method what was called of it.
    """

    def __init__(self, name: str, module: Any, tracer: Tracer) -> None:
        self.module, self._tracer = module, tracer
        self._plain = {method: getattr(module, method) for method in METHODS if callable(getattr(module, method, None))}
        inner = [part for part in _MODULES if isinstance(getattr(module, part, None), nn.Module)]
        vars(module).update({_CALL + part: getattr(module, part)._call_impl for part in inner})
        seams = [method for method in _SEAMS if callable(getattr(module, method, None))]
        parts = [*(_CALL + part for part in inner), *seams]
        tracer.watch(name, module, (*self._plain, *parts))
        self._like = fake_of(module)
        Casts(module, tracer)
        self._watched = {method: getattr(module, method) for method in self._plain}
        self._parts = {part: Replay(getattr(module, part), tracer, self._like) for part in parts}
        vars(module).update({part: self._parts[part] for part in seams})
        for part in inner:
            getattr(module, part)._compiled_call_impl = self._parts[_CALL + part]
        self.replays: dict[str, Replay] = {}
        for method in self._plain:
            self.replays[method] = Replay(self._runner(method), tracer, self._like, self._complete)
            vars(module)[method] = self.replays[method]

    def _runner(self, method: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._plain[method](*args, **kwargs)  # traces the parts: nothing that is watched runs around them
            for known in self._known_parts():
                known.count = 0
            return self._watched[method](*args, **kwargs)

        return run

    def _known_parts(self) -> list[Known]:
        return [known for replay in self._parts.values() for known in replay.known.values()]

    def _complete(self, call: Call) -> Call:
        return _with_parts(call, self._known_parts())

    def again(self, method: str, known: Known) -> Call:
        """Run a call that was recorded once more, as the VAE is set now."""
        views, sizes, spec = known.arguments
        args, kwargs = tree_unflatten(rebuild(views, sizes, self._like), spec)
        self._runner(method)(*args, **kwargs)
        return self._complete(self._tracer.calls[-1])


def _with_parts(whole: Call, parts: Iterable[Known]) -> Call:
    """The call with the work of its parts, each as often as it happened."""
    works = [[(1, block.works)] for block in whole.blocks]
    outside = [(1, whole.outside)]
    blocks = list(whole.blocks)
    for part in parts:
        if not part.count:
            continue
        outside.append((part.count, part.traced.outside))
        for index, block in enumerate(part.traced.blocks):
            works[index].append((part.count, block.works))
            most = max(blocks[index].activation_bytes, block.activation_bytes)
            blocks[index] = replace(blocks[index], activation_bytes=most, calls=blocks[index].calls + part.count * block.calls)
    made = tuple(BlockWork(merged(shares), b.activation_bytes, b.calls) for b, shares in zip(blocks, works, strict=True))
    return replace(whole, blocks=made, outside=merged(outside))


def merged(shares: Iterable[tuple[int, tuple[Work, ...]]]) -> tuple[Work, ...]:
    """Works of several shares, each share so many times, equal operations added up."""
    totals: dict[tuple[str, str, str], list[int]] = {}
    for times, works in shares:
        for work in works:
            total = totals.setdefault((work.kind, work.dtype, work.signature), [0, 0, 0, 0])
            for place, value in enumerate((work.flop, work.traffic_bytes, work.weight_bytes, work.calls)):
                total[place] += times * value
    return tuple(
        Work(kind, dtype, flop, traffic, weights, calls, signature)
        for (kind, dtype, signature), (flop, traffic, weights, calls) in totals.items()
    )
