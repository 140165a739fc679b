"""The nodes: schemas and a few lines each. What they decide and how it reaches the host is in ``overflowml_comfyui``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from overflowml_comfyui import loader, running_host
from overflowml_comfyui.decision import Decision, Part, decide_file, decide_module, over_budget
from overflowml_comfyui.lowering import flag_advice
from overflowml_comfyui.measurement import Measurement
from overflowml_comfyui.preflight import Preflight, decide_graph
from overflowml_comfyui.profile import samples_of
from overflowml_comfyui.report import picture_of, text_of
from overflowml_comfyui.request import request_of
from overflowml_comfyui.sampling import SamplerWatch
from overflowml_core import session
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.units import format_bytes, parse_bytes

from .schema import PlanType, budget_fields, schema, shown, size_fields

_AHEAD = "Nothing is loaded for this: the file's header alone was read."


class Optimize(io.ComfyNode):
    """Plans for live models, and has the host keep the plan's reserve while it samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return schema(
            node_id="OverflowMLOptimize",
            display_name="OverflowML Optimize",
            description="Plans the model's memory for a budget and a size, says what limits a step, and keeps the reserve while sampling.",
            search_aliases=["overflowml", "vram", "budget", "reserve", "offload", "low vram"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled. LoRA may come before or after this node."),
                *budget_fields(),
                *size_fields(),
                io.Clip.Input("clip", optional=True, tooltip="Text encoder to plan for as well; it is handed on as it is."),
                io.Vae.Input("vae", optional=True, tooltip="VAE to plan for as well; it is handed on as it is."),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Takes width, height, frames and batch from this latent instead of the fields."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
                PlanType.Output(display_name="PLAN"),
                io.String.Output(display_name="REPORT"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any = None, vae: Any = None, latent: Any = None, **fields: Any) -> io.NodeOutput:
        """Plan; the host's cache keeps the result, and what hangs on the MODEL acts each time it is sampled."""
        patcher, module = running_host.module_of(model, "MODEL")
        if latent is not None:
            shape = tuple(latent["samples"].shape)
            fields = {**fields, **running_host.sizes_of(running_host.latent_format_of(patcher), shape)}
        request, machine = request_of(fields), running_host.machine()
        recall = running_host.measurements().of
        part = decide_module("model", module, request, machine, recall)
        others = [("text encoder", clip, "CLIP"), ("vae", vae, "VAE")]
        parts = [
            decide_module(name, running_host.module_of(one, what)[1], request, machine, recall)
            for name, one, what in others
            if one is not None
        ]
        decision = Decision((part, *parts))
        changed = watched(model, part, request.budget_bytes is not None, cls.hidden.unique_id)
        picture, text = described(decision, running_host.engine_sentence(patcher, request.budget_bytes is not None))
        return io.NodeOutput(changed, clip, vae, decision, text, ui=shown(picture, text))


class PlanPreview(io.ComfyNode):
    """Plans for a file without loading it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return schema(
            node_id="OverflowMLPlanPreview",
            display_name="OverflowML Plan Preview",
            description="Says from a file's header whether the model fits, how long a step takes and what limits it. Loads nothing.",
            search_aliases=["overflowml", "does it fit", "vram estimate", "predict"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("file", options=running_host.model_files(), tooltip="A file of the host's model folders."),
                *budget_fields(),
                *size_fields(),
            ],
            outputs=[PlanType.Output(display_name="PLAN"), io.String.Output(display_name="REPORT")],
        )

    @classmethod
    def execute(cls, file: str, **fields: Any) -> io.NodeOutput:
        """Read the header and plan."""
        folder, _, name = file.partition("/")
        path = running_host.file_of(folder, name)
        if path is None:
            raise NotAModel(file, "it is in none of the host's folders any more; choose another one")
        decision = Decision((decide_file(path, request_of(fields), running_host.machine(), running_host.measurements().of),))
        picture, text = described(decision, _AHEAD)
        return io.NodeOutput(decision, text, ui=shown(picture, text))


class BudgetCheck(io.ComfyNode):
    """Stops a graph early, in the plan's own words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return schema(
            node_id="OverflowMLBudgetCheck",
            display_name="OverflowML Budget Check",
            description="Hands its input on if the plan fits and keeps the budget; else stops the graph and says what would make it fit.",
            search_aliases=["overflowml", "guard", "assert", "stop"],
            inputs=[
                io.AnyType.Input("value", tooltip="Anything; handed on as it is."),
                PlanType.Input("plan", tooltip="From Optimize or Plan Preview."),
                io.String.Input("budget", default="", tooltip="Most memory of the device that the plan may take. Empty: its own budget."),
            ],
            outputs=[io.AnyType.Output(display_name="value")],
        )

    @classmethod
    def execute(cls, value: Any, plan: Decision, budget: str = "") -> io.NodeOutput:
        """Check, and hand on."""
        limit = parse_bytes(budget.strip(), "budget") if budget.strip() else None
        broken = plan.refusal if limit is None else over_budget(plan, limit)
        if broken:
            raise OverflowmlError(broken)
        return io.NodeOutput(value)


class MemoryGuard(io.ComfyNode):
    """Frees the device between two nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return schema(
            node_id="OverflowMLMemoryGuard",
            display_name="OverflowML Memory Guard",
            description="Unloads models until so much of the device is free, gives back what nobody uses, and hands its input on.",
            search_aliases=["overflowml", "free memory", "unload", "clean vram"],
            inputs=[
                io.AnyType.Input("value", tooltip="Anything; handed on as it is."),
                io.String.Input("free", default="2GB", tooltip="What shall be free on the device, such as 2GB."),
            ],
            outputs=[io.AnyType.Output(display_name="value"), io.String.Output(display_name="REPORT")],
        )

    @classmethod
    def execute(cls, value: Any, free: str = "2GB") -> io.NodeOutput:
        """Free, and hand on."""
        wanted = parse_bytes(free.strip(), "free")
        now, cleaning = running_host.free_memory(wanted)
        short = "" if now >= wanted else f", {format_bytes(wanted - now)} less than asked for: nothing more can be unloaded"
        given = [f"{format_bytes(nbytes)} of {name}" for name, nbytes in cleaning.freed_bytes.items() if nbytes]
        back = f"; given back {', '.join(given)}" if given else ""
        text = f"{format_bytes(now)} of the device are free{short}{back}"
        return io.NodeOutput(value, text, ui={"text": [text]})


class Calibrate(io.ComfyNode):
    """Measures the machine once, so that plans have seconds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return schema(
            node_id="OverflowMLCalibrate",
            display_name="OverflowML Calibrate",
            description="Measures how fast this machine computes, copies and reads, and keeps it.",
            search_aliases=["overflowml", "benchmark", "bandwidth"],
            is_output_node=True,
            inputs=[io.Boolean.Input("quick", default=True, tooltip="Fewer and smaller measurements: seconds instead of a minute or two.")],
            outputs=[io.String.Output(display_name="REPORT")],
        )

    @classmethod
    def execute(cls, quick: bool = True) -> io.NodeOutput:
        """Measure, with one step of progress for each thing that is measured."""
        done: list[str] = []
        rates = session.calibrate(done.append, quick).rates
        rows = (
            ("pinned RAM to the device", rates.h2d_bytes_per_s),
            ("device to RAM", rates.d2h_bytes_per_s),
            ("disk", rates.disk_bytes_per_s),
            ("the device's own memory", rates.memory_bytes_per_s),
        )
        text = "\n".join(
            [f"{name}: {format_bytes(round(rate))} a second" for name, rate in rows if rate] + [f"measured: {len(done)} things"]
        )
        return io.NodeOutput(text, ui={"text": [text]})


NODES = (Optimize, PlanPreview, BudgetCheck, MemoryGuard, Calibrate)


def watch_prompts() -> None:
    """Have the host show us each graph that is queued; its models alone where its classes are used without a server."""
    from server import PromptServer

    running_host.join_plugins()
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(Preflight(_decide_prompt, _tell_verdict))


def _decide_prompt(prompt: object) -> Decision:
    return decide_graph(prompt, running_host.file_of, running_host.machine(), running_host.measurements().of, loader.foresee)


def _tell_verdict(decision: Decision, client: str | None) -> None:
    running_host.send("verdict", picture_of(decision), client)


def watched(model: Any, part: Part, is_capped: bool, node: str) -> Any:
    """A copy of a MODEL that keeps its plan's reserve and is measured while it is sampled; the MODEL itself stays as it is.

    Args:
        model: the MODEL.
        part: with its plan, if there is one.
        is_capped: the budget was asked for.
        node: that shows what is measured.
    """
    patcher, module = running_host.module_of(model, "MODEL")
    changed = model.clone()
    for place in (WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.APPLY_MODEL):
        changed.remove_wrappers_with_key(place, running_host.WRAPPER_KEY)  # of a node of ours before this one
    if part.plan is not None:
        reserve = running_host.with_reserve(part.plan, is_capped)
        changed.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, running_host.WRAPPER_KEY, reserve)
        headroom = running_host.with_headroom(part.plan, is_capped)
        changed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, running_host.WRAPPER_KEY, headroom)
    ran = Ran(part, running_host.latent_format_of(patcher), samples_of(module, part.workload.batch), node)
    watch = SamplerWatch(patcher.load_device, ran.tell, running_host.loaded_weights)
    changed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, running_host.WRAPPER_KEY, watch.around_sampler)
    changed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, running_host.WRAPPER_KEY, watch.around_step)
    changed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, running_host.WRAPPER_KEY, watch.around_pass)
    return changed


def described(decision: Decision, engine: str) -> tuple[dict[str, object], str]:
    """A decision as the page draws it, and as text with a sentence about how the host carries it out."""
    slowest = decision.parts[0].slowest
    advice = flag_advice(None if slowest is None else slowest.bound_by, running_host.start_flags(), running_host.has_accelerator())
    return picture_of(decision), text_of(decision, engine, advice)


@dataclass(frozen=True, slots=True)
class Ran:
    """What is done with each run of an optimized MODEL. Holds no model: it outlives none.

    Attributes:
        part: what was planned.
        latent_format: of the model.
        samples: images or videos in a planned pass.
        node: that shows it.
    """

    part: Part
    latent_format: Any
    samples: int
    node: str

    def tell(self, measured: Measurement, shape: tuple[int, ...]) -> None:
        """Keep a run under the sizes that it had, and show it in the node."""
        key = self.part.at(running_host.sizes_of(self.latent_format, shape))
        component = self.part.component if key == self.part.key else replace(self.part.component, profiles=())
        running_host.learn(component, key, measured, self.samples)
        if key == self.part.key:
            picture = picture_of(Decision((replace(self.part, measured=measured),)))
            running_host.send("measured", {"node": self.node, **picture})
