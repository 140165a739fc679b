"""The cuda part: a model of the size of Qwen3-30B-A3B that waits in RAM, on an accelerator with less memory than it takes.

Ours, accelerate's automatic device map under the same limit and, where it fits, everything on the device follow each other in one process,
on the same weights: ours gives them back before accelerate takes them. On a CPU only ours and resident run, on a small model, which tries
the script and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from moe_model import MoeShape, Weights, text_of
from moe_policies import optimum
from moe_trace import Recorder, Trace, joined
from report import Report
from stream_ram import Clock, link_rate
from stream_system import available_bytes
from torch import nn

import overflowml
from overflowml_core.expert_report import ExpertReport
from overflowml_core.facts import Workload
from overflowml_core.units import parse_bytes

FULL = MoeShape(hidden=2048, intermediate=768, layers=48, experts=128, per_token=8, heads=32, kv_heads=4, head=128, vocabulary=151936)
"""Qwen3-30B-A3B: 61 GB in bfloat16."""
SMALL = MoeShape(hidden=128, intermediate=64, layers=3, experts=16, per_token=2, heads=2, kv_heads=1, head=64, vocabulary=500)
"""A model of 3 MB, to try the script."""
SLOW_TOKENS = 8
"""Of an answer of accelerate's."""
_RAM_SHARE = 0.85
"""Of the RAM that is available; the weights wait there once and are pinned a second time."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        device: that computes.
        budget_bytes: of it.
        shape: of the model.
        prompt_tokens, new_tokens: of an answer.
        turns: answers of each side.
    """

    device: torch.device
    budget_bytes: int
    shape: MoeShape
    prompt_tokens: int
    new_tokens: int
    turns: int

    @property
    def accelerated(self) -> bool:
        """Whether the device has memory of its own."""
        return self.device.type != "cpu"


def settings_of(options: argparse.Namespace) -> Settings:
    """From the command line."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    small = options.quick or device.type == "cpu"
    shape = SMALL if small else replace(FULL, layers=options.layers or layers_in(int((available_bytes() or 0) * _RAM_SHARE), FULL))
    return Settings(
        device=device,
        budget_bytes=2_000_000 if small else parse_bytes(options.cuda_budget, "--cuda-budget"),
        shape=shape,
        prompt_tokens=options.prompt,
        new_tokens=options.new,
        turns=options.turns,
    )


def layers_in(room_bytes: int, shape: MoeShape) -> int:
    """How many layers of a shape fit twice into so much RAM: at least one, at most all.

    Args:
        room_bytes: of RAM.
        shape: of the whole model.
    """
    layer_bytes = sum(2 * torch.Size(size).numel() for name, size in replace(shape, layers=1).weights() if ".layers." in name)
    fixed_bytes = sum(2 * torch.Size(size).numel() for name, size in replace(shape, layers=0).weights())
    return max(1, min(shape.layers, (room_bytes // 2 - fixed_bytes) // layer_bytes))


def make_live(shape: MoeShape, device: torch.device) -> Any:
    """The model in RAM, drawn by a device that is quick at that.

    Args:
        shape: of the model.
        device: that draws the weights.
    """
    import transformers

    named = {name: value for name, value in shape.config().items() if name not in ("architectures", "model_type")}
    config = transformers.Qwen3MoeConfig(**named)
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16)
    weights = Weights(shape, device if device.type == "cuda" else "cpu")
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        drawn = nn.Parameter(weights.draw(name, tuple(parameter.shape)).cpu(), requires_grad=False)
        setattr(model.get_submodule(owner), last, drawn)
    # Its buffers are computed from the configuration alone.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@dataclass
class Answers:
    """What one side showed.

    Attributes:
        prefill_s: of each answer.
        seconds: of each token of all answers.
        logits: of the last token of each answer, on the CPU.
        peak_bytes: most that torch's allocator gave out.
        traces: what the routers chose.
        counts: of experts, before and after the tokens of each answer.
        error: why there is no more.
    """

    prefill_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    peak_bytes: int = 0
    traces: list[Trace] = field(default_factory=list)
    counts: list[tuple[ExpertReport, ExpertReport]] = field(default_factory=list)
    error: str = ""


Side = Callable[[Any, Settings], Any]


@contextmanager
def ours(model: nn.Module, settings: Settings) -> Iterator[Any]:
    """overflowml under the budget."""
    limits = overflowml.Limits.exactly(device_memory=settings.budget_bytes, quality="lossless", trial=False)
    try:
        yield overflowml.manage(model, limits, Workload(prompt_tokens=settings.prompt_tokens, new_tokens=settings.new_tokens))
    finally:
        overflowml.release(model)


@contextmanager
def accelerate(model: nn.Module, settings: Settings) -> Iterator[None]:
    """accelerate's automatic device map with the same limit, as ``device_map="auto"`` makes it."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import remove_hook_from_submodules

    limits = {settings.device.index or 0: settings.budget_bytes, "cpu": 2**50}
    where = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=list(model._no_split_modules))
    dispatch_model(model, where, main_device=settings.device.index or 0)
    try:
        yield None
    finally:
        remove_hook_from_submodules(model)


@contextmanager
def resident(model: nn.Module, settings: Settings) -> Iterator[None]:
    """Everything on the device."""
    model.to(settings.device)
    yield None


def measure(settings: Settings, report: Report, notes: list[str]) -> list[tuple[str, str]]:
    """Have all sides answer, and add the figures. Returns titles and tables."""
    model = make_live(settings.shape, settings.device)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    sides: dict[str, Side] = {"ours": ours}
    if settings.device.type == "cuda":
        sides["accelerate"] = accelerate
    # Last, for it takes the weights out of RAM for good.
    if not settings.accelerated or torch.get_device_module(settings.device).mem_get_info()[0] > weight_bytes * 1.1:
        sides["resident"] = resident
    rate = link_rate(settings.device, 2**20 if settings.shape is SMALL else 2**30) if settings.accelerated else None
    recorder = Recorder(settings.shape.experts, settings.shape.per_token)
    recorder.watch([layer.mlp.gate for layer in model.model.layers])
    found = {}
    for name, side in sides.items():
        found[name] = _answers(name, side, model, recorder, settings)
        if found[name].error:
            notes.append(f"cuda.{name}: {found[name].error}")
            print(notes[-1], file=sys.stderr, flush=True)
    report.add("cuda.weights_bytes", weight_bytes, "bytes")
    report.add("cuda.budget_bytes", settings.budget_bytes, "bytes")
    add_figures(report, found, rate)
    return [("On an accelerator", table(found))]


def _answers(name: str, side: Side, model: Any, recorder: Recorder, settings: Settings) -> Answers:
    found = Answers()
    module = torch.get_device_module(settings.device) if settings.accelerated else None
    if module is not None:
        module.reset_peak_memory_stats()
    try:
        with side(model, settings) as attachment:
            recorder.take()
            for turn in range(-1, settings.turns):
                # Turn -1 warms up: kernels are built, and the cache fills.
                tokens = SLOW_TOKENS if name == "accelerate" else settings.new_tokens
                ids = text_of(settings.prompt_tokens + settings.new_tokens, settings.shape.vocabulary, seed=100 + turn)
                text = ids[settings.prompt_tokens :][:tokens]
                _answer(found if turn >= 0 else Answers(), model, attachment, (ids[: settings.prompt_tokens], text), settings.device)
                trace = recorder.take()
                if turn >= 0:
                    found.traces.append(trace)
    except Exception as error:  # noqa: BLE001 -- whatever a side fails with is its result
        found.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if module is not None:
        found.peak_bytes = int(module.max_memory_allocated())
        gc.collect()
        module.empty_cache()
    return found


def _answer(found: Answers, model: Any, attachment: Any, asked: tuple[list[int], list[int]], device: torch.device) -> None:
    """One answer; see moe_side.py."""
    from transformers import DynamicCache

    prompt, text = asked
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():

        def run(ids: list[int]) -> torch.Tensor:
            tokens = torch.tensor([ids], device=device)
            logits: torch.Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            return logits

        clock = Clock(device)
        clock.mark()
        last = run(prompt)
        clock.mark()
        found.prefill_s += clock.seconds()
        before = attachment.expert_report() if attachment is not None else None
        clock = Clock(device)
        clock.mark()
        for token in text:
            last = run([token])
            # As whoever samples does: the next token is not known before this one's logits are.
            last.argmax().item()
            clock.mark()
        found.seconds += clock.seconds()
    after = attachment.expert_report() if attachment is not None else None
    if before is not None and after is not None:
        found.counts.append((before, after))
    found.logits.append(last.float().to("cpu", copy=True))


def add_figures(report: Report, found: dict[str, Answers], rate_bytes_per_s: float | None) -> None:
    """Ours against accelerate, the optimum and the limit.

    Args:
        report: gets the figures.
        found: by side.
        rate_bytes_per_s: of the link; None where there is none.
    """
    timed = {name: answers for name, answers in found.items() if answers.seconds and not answers.error}
    for name, answers in timed.items():
        report.add(f"cuda.{name}.tokens_per_s", 1 / statistics.fmean(answers.seconds), "tokens/s")
        report.add(f"cuda.{name}.prefill_s", statistics.median(answers.prefill_s), "s")
        report.add(f"cuda.{name}.peak_bytes", answers.peak_bytes, "bytes")
    mine = timed.get("ours")
    if mine is None:
        return
    token_s = statistics.fmean(mine.seconds)
    for name in ("accelerate", "resident"):
        if name in timed:
            report.add(f"cuda.decode.vs_{name}", statistics.fmean(timed[name].seconds) / token_s, "times as fast")
            prefill = statistics.median(timed[name].prefill_s) / statistics.median(mine.prefill_s)
            report.add(f"cuda.prefill.vs_{name}", prefill, "times as fast")
    if "resident" in timed:
        pairs = zip(mine.logits, timed["resident"].logits, strict=True)
        report.add("cuda.max_abs_difference", max(float((one - other).abs().max()) for one, other in pairs), "of a logit, from resident")
    if not mine.counts:
        return
    requests = sum(after.requests - before.requests for before, after in mine.counts)
    hits = sum(_hits(after) - _hits(before) for before, after in mine.counts)
    fetched = sum(after.fetched_bytes - before.fetched_bytes for before, after in mine.counts) / len(mine.seconds)
    slots = mine.counts[-1][1].slots
    report.add("cuda.cache.slots", slots, "experts")
    report.add("cuda.cache.hit_rate", hits / requests, "of the experts that tokens asked for; those brought ahead of time are none")
    report.add("cuda.cache.hit_rate_optimum", optimum(joined(mine.traces), slots).rate, "of them, by knowing all that comes")
    report.add("cuda.fetched_bytes", fetched, "bytes a token")
    report.add("cuda.computed_on_cpu", sum(after.on_cpu - before.on_cpu for before, after in mine.counts) / requests, "of the experts")
    if rate_bytes_per_s is not None:
        report.add("cuda.link_rate", rate_bytes_per_s, "bytes/s")
        computing_s = statistics.fmean(timed["resident"].seconds) if "resident" in timed else 0.0
        report.add("cuda.share_of_limit", max(computing_s, fetched / rate_bytes_per_s) / token_s, "of the limit's rate")


def _hits(report: ExpertReport) -> int:
    return sum(bank.hits for bank in report.banks)


def table(found: dict[str, Answers]) -> str:
    """The sides as Markdown."""
    lines = ["| side | prefill | tokens/s | peak on the device | |", "|---|---|---|---|---|"]
    for name, answers in found.items():
        if answers.seconds:
            rate = 1 / statistics.fmean(answers.seconds)
            cells = [
                name,
                f"{statistics.median(answers.prefill_s):.3f} s",
                f"{rate:.2f}",
                f"{answers.peak_bytes / 1e9:.2f} GB",
                answers.error,
            ]
        else:
            cells = [name, "", "", "", answers.error.replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
