"""What the passes of a pipeline compute and hold: its own ``__call__`` runs on fake tensors over a twin, and every call of a component is
recorded. Where a pipeline cannot run so, its components run one by one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from overflowml_core.facts import BlockWork, Component, Network, PassProfile, Workload
from overflowml_core.runtime.component import weight_facts
from overflowml_core.runtime.fake import Tracer, tracing
from overflowml_core.runtime.probe import pass_profile, peak_of
from overflowml_diffusers import inputs
from overflowml_diffusers.alone import arguments_of
from overflowml_diffusers.describe import ordered_modules
from overflowml_diffusers.replay import Known, Replay, fake_of, stand_in_front
from overflowml_diffusers.twin import CannotCopy, RealMasks, quiet, twin_module, twin_pipeline
from overflowml_diffusers.vae import TracedVae, is_vae
from overflowml_diffusers.variants import find_variants

_log = logging.getLogger("overflowml")


@dataclass(slots=True)
class Recorded:
    """Calls of a pipeline's components: by component and method, in the order in which each first happened.

    Attributes:
        replays: what stands in front of each method of each component.
        vaes: those of the components that are VAEs.
        scale: how many real calls each recorded one stands for.
        twin: the pipeline that ran. It has reference cycles: tensors of its scheduler that are freed while variants are traced would lower
            what those seem to hold.
        failure: why the pipeline could not run; empty where it could.
    """

    replays: dict[str, dict[str, Replay]] = field(default_factory=dict)
    vaes: dict[str, TracedVae] = field(default_factory=dict)
    scale: float = 1.0
    twin: object = None
    failure: str = ""
    _first_of: dict[object, Replay] = field(default_factory=dict)

    def calls(self, component: str) -> list[tuple[str, Known]]:
        """(method, call) of a component."""
        return [(method, known) for method, replay in self.replays.get(component, {}).items() for known in replay.known.values()]

    def watch(self, tracer: Tracer, name: str, module: nn.Module) -> None:
        """Record the calls of a component."""
        if is_vae(module):
            self.vaes[name] = TracedVae(name, module, tracer)
            self.replays[name] = self.vaes[name].replays
        else:
            tracer.watch(name, module)
            replay = stand_in_front(module, "forward", tracer, fake_of(module))
            self.replays[name] = {"forward": replay}
            # Two transformers of one kind, as Wan 2.2 has them: what one does, the other does.
            shape = (type(module), repr(getattr(module, "config", id(module))), weight_facts(module))
            first = self._first_of.setdefault(shape, replay)
            replay.sibling = None if first is replay else first

    def forget(self) -> None:
        """Drop the calls of a run that failed."""
        for replays in self.replays.values():
            for replay in replays.values():
                replay.known.clear()


def measure_pipeline(pipe: Any, network: Network, workload: Workload) -> Network:
    """The network of a pipeline with the profiles and variants of its components.

    Args:
        pipe: live, or without data; only read.
        network: its description.
        workload: what is open is the pipeline's own default.
    """
    with quiet(), tracing() as tracer:
        recorded = _run(tracer, pipe, workload)
        seen = {component.name: _seen(component, recorded) for component in network.components}
    modules = ordered_modules(pipe)
    if recorded.failure:
        _log.info("%s cannot run on fake tensors (%s); its components run one by one", network.class_name, recorded.failure)
        workload = inputs.own_sizes(pipe, workload)
    components = tuple(
        seen[c.name] or (_alone(c, modules[c.name], workload, recorded.failure) if recorded.failure else _never_called(c))
        for c in network.components
    )
    return replace(network, components=components)


def measure_model(model: Any, network: Network, workload: Workload) -> Network:
    """The same for a single model."""
    return replace(network, components=(_alone(network.components[0], model, workload, ""),))


def _run(tracer: Tracer, pipe: Any, workload: Workload) -> Recorded:
    recorded = Recorded()
    try:
        twin = twin_pipeline(pipe, workload.prompt_tokens)
    except CannotCopy as error:
        recorded.failure = str(error)
        return recorded
    recorded.twin = twin
    for name, module in ordered_modules(twin).items():
        recorded.watch(tracer, name, module)
    failures: list[str] = []
    for attempt in inputs.attempts(pipe, workload):
        recorded.scale = attempt.scale
        try:
            with RealMasks():
                twin(**attempt.arguments)
        except Exception as error:  # noqa: BLE001 -- foreign code on fake tensors: whatever it raises, the next way of running it follows
            if any("decode" in r and r["decode"].known for r in recorded.replays.values()):
                failures.clear()  # what comes after a decoding is done with pixels
                break
            failures.append(_in_short(error))
            recorded.forget()
        else:
            failures.clear()
            break
    recorded.failure = failures[0] if failures else ""
    return recorded


def _seen(component: Component, recorded: Recorded) -> Component | None:
    """The component with the profiles of its recorded calls, None where there are none."""
    passes = [
        (method, known, _profile(component, method, known, max(round(known.count * recorded.scale), 1)))
        for method, known in recorded.calls(component.name)
    ]
    if not passes:
        return None
    made = with_profiles(component, tuple(profile for _, _, profile in passes))
    if component.name in recorded.vaes:
        made = replace(made, variants=find_variants(recorded.vaes[component.name], passes))
    return made


def pass_name(module_class: str, method: str) -> str:
    """The name of a pass: of a VAE its method, of a model of transformers "encode", of every other one "denoise"."""
    if method != "forward":
        return method
    import transformers

    return "encode" if hasattr(transformers, module_class) else "denoise"


def _profile(component: Component, method: str, known: Known, count: int) -> PassProfile:
    made = pass_profile(known.traced, pass_name(component.class_name, method), count)
    return replace(made, activation_bytes=known.peak_bytes)


def _never_called(component: Component) -> Component:
    idle = tuple(BlockWork(calls=0) for _ in component.blocks)
    note = "the pipeline does not call it for this work"
    never = PassProfile(pass_name(component.class_name, "forward"), 0, 0, idle, note=note)
    return replace(component, profiles=(never,), activation_bytes=0, activation_source="traced")


def with_profiles(component: Component, profiles: tuple[PassProfile, ...]) -> Component:
    """The component with its passes, and the largest of their peaks. Passes that differ in their arguments' layout alone count as one."""
    kinds: dict[tuple[str, int], PassProfile] = {}
    for profile in profiles:
        key = (profile.name, profile.flop)
        other = kinds.get(key)
        if other is not None:
            most = max(profile, other, key=lambda p: p.count)
            peak_bytes = max(profile.activation_bytes, other.activation_bytes)
            profile = replace(most, count=profile.count + other.count, activation_bytes=peak_bytes)
        kinds[key] = profile
    passes = tuple(kinds.values())
    return replace(component, profiles=passes, activation_bytes=peak_of(passes), activation_source="traced")


def _alone(component: Component, module: nn.Module, workload: Workload, reason: str) -> Component:
    """A component by itself, with inputs made up for its kind; where none are known, what its description says."""
    recorded = Recorded()
    try:
        with quiet(), tracing() as tracer:
            twin = twin_module(module)
            recorded.watch(tracer, component.name, twin)
            method = "decode" if is_vae(module) else "forward"
            if pass_name(component.class_name, method) == "denoise":
                recorded.scale = workload.steps or inputs.ASSUMED_STEPS
            with RealMasks():
                (twin if method == "forward" else getattr(twin, method))(**arguments_of(twin, workload))
            seen = _seen(component, recorded)
        assert seen is not None
        if reason:
            note = f"it was traced by itself, because its pipeline cannot run on fake tensors ({reason})"
            seen = replace(seen, profiles=tuple(replace(p, note="; ".join(filter(None, (p.note, note)))) for p in seen.profiles))
    except Exception as error:  # noqa: BLE001 -- as above; the estimate of the description stands, and says why
        why = f"{reason}; {_in_short(error)}" if reason else _in_short(error)
        return _analytic(component, workload, why)
    return seen


def _analytic(component: Component, workload: Workload, why: str) -> Component:
    name = pass_name(component.class_name, "decode" if "Autoencoder" in component.class_name else "forward")
    count = (workload.steps or inputs.ASSUMED_STEPS) if name == "denoise" else 1
    profile = PassProfile(name, count, component.activation_bytes, note=f"it cannot run on fake tensors ({why})")
    return replace(component, profiles=(profile,))


def _in_short(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:160]}"
