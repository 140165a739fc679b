"""Predicted against measured: bytes of the weights, peak of the compute tier, seconds of every kind of pass, for small models of many
families.

Each model is described and profiled without running it. Then it really runs: once as it is, on this machine, where every pass is timed; and
once under a budget of about two thirds of what it takes, on a GPU or else on the virtual accelerator of the tests, in a process of its
own, where the allocator's peak is read.

    python benchmarks/predict.py --json benchmarks/results/predict.json

Times rest on a calibration of the machine and of the models' own operations, made in the same run; `time.roofline` are the errors
without the latter. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from predict_models import SUBJECTS, Subject
from report import Report
from torch import nn

import overflowml
from overflowml_core import session
from overflowml_core.facts import Limits, Machine, Network

ROOT = Path(__file__).resolve().parents[1]
CYCLES = 5
"""How often predicting and measuring take turns in the long run."""
LEAST_PASS_S = 0.01
"""Passes shorter than this are not judged: a scheduler's hiccup is a tenth of them."""


@dataclass
class Stopwatch:
    """Stands where a trace's tracer stands, and times real calls: it has the calls that drivers ask a tracer for.

    Attributes:
        seconds: by component and pass, of every call.
    """

    calls: list[Any] = field(default_factory=list)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    _depth: int = 0
    _started: float = 0.0

    def enter(self) -> None:
        """A component's call begins; one inside another is part of it."""
        self._depth += 1
        if self._depth == 1:
            _synchronize()
            self._started = time.perf_counter()

    def leave(self, component: str, method: str) -> None:
        """It ends."""
        self._depth -= 1
        if self._depth == 0:
            from overflowml_core.runtime.fake import Call

            _synchronize()
            taken = time.perf_counter() - self._started
            self.seconds.setdefault((component, method), []).append(taken)
            self.calls.append(Call(component, method, "", round(taken * 1e9), 0, (), ()))

    @contextmanager
    def calling(self, component: str, method: str, arguments: object = ()) -> Iterator[None]:
        """A part of a component that runs by itself."""
        self.enter()
        try:
            yield
        finally:
            self.leave(component, method)

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Time the calls of a module; returns its hooks."""
        return [
            module.register_forward_pre_hook(lambda *_: self.enter(), prepend=True),
            module.register_forward_hook(lambda *_: self.leave(name, "forward"), always_call=True),
        ]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def is_pipeline(target: object) -> bool:
    """Whether it is a diffusers pipeline."""
    return not isinstance(target, nn.Module)


def build(subject: Subject) -> Any:
    """The model with seeded random weights and, where it is a pipeline, tokenizers that need no vocabulary."""
    torch.manual_seed(0)
    target = subject.make()
    if is_pipeline(target):
        from overflowml_diffusers.tokenizers import stub_for

        target.set_progress_bar_config(disable=True)
        for name in list(target.components):
            if "tokenizer" in name:
                setattr(target, name, stub_for(name, target.components, subject.workload.prompt_tokens))
        for part in target.components.values():
            if isinstance(part, nn.Module):
                part.eval()
    return target


def run(target: Any, subject: Subject, device: str = "cpu") -> dict[tuple[str, str], float]:
    """One unit of work. Median seconds by (component, pass).

    Args:
        target: the model or pipeline.
        subject: what it is asked to do.
        device: where a model finds its inputs; a pipeline sees to that by itself.
    """
    watch = Stopwatch()
    hooks: list[Any] = []
    with torch.no_grad():
        if is_pipeline(target):
            from overflowml_diffusers.describe import ordered_modules
            from overflowml_diffusers.inputs import attempts
            from overflowml_diffusers.profile import pass_name

            modules = ordered_modules(target)
            for name, module in modules.items():
                hooks += watch.watch(name, module)
                if hasattr(module, "decode"):
                    _wrap_decode(watch, name, module, hooks)
            try:
                target(**next(attempts(target, subject.workload)).arguments)
            finally:
                _remove(hooks)
            names = {key: (key[0], pass_name(type(modules[key[0]]).__name__, key[1])) for key in watch.seconds}
            return {names[key]: statistics.median(values) for key, values in watch.seconds.items()}
        from overflowml_transformers.passes import passes

        hooks = watch.watch("model", target)
        try:
            # The driver of the traces, on real tensors: a profile's activation bytes are the nanoseconds that the stopwatch put there.
            with torch.device(device):
                return {("model", p.name): p.activation_bytes / 1e9 for p in passes(watch, target, subject.workload)}  # type: ignore[arg-type]
        finally:
            _remove(hooks)


def _wrap_decode(watch: Stopwatch, name: str, module: Any, hooks: list[Any]) -> None:
    bound = module.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        with watch.calling(name, "decode"):
            return bound(*args, **kwargs)

    vars(module)["decode"] = decode
    hooks.append(_Undo(module))


@dataclass
class _Undo:
    module: Any

    def remove(self) -> None:
        """The method of the class again."""
        vars(self.module).pop("decode", None)


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def true_weight_bytes(target: Any) -> int:
    """Bytes of the loaded parameters, each storage once."""
    modules = [p for p in target.components.values() if isinstance(p, nn.Module)] if is_pipeline(target) else [target]
    found = {id(p): p.numel() * p.element_size() for module in modules for p in module.parameters()}
    return sum(found.values())


def predicted_seconds(network: Network, machine: Machine, subject: Subject) -> dict[tuple[str, str], float]:
    """Seconds of each kind of pass with everything resident, by (component, pass)."""
    plan = session.make_plan(network, Limits(quality="lossless"), subject.workload, machine)
    return {(p.component, p.name): p.pass_s for phase in plan.phases for p in phase.passes if p.pass_s is not None}


def _medians(times: list[dict[tuple[str, str], float]]) -> dict[tuple[str, str], float]:
    return {key: statistics.median(one[key] for one in times) for key in times[0]}


def errors(predicted: dict[tuple[str, str], float], measured: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Signed relative errors of the passes that are long enough to be judged."""
    return {key: predicted[key] / measured[key] - 1 for key in predicted if measured.get(key, 0.0) >= LEAST_PASS_S}


# ---- the compute tier's peak, in a process of its own


def measure_peak(name: str) -> None:
    """Child process: run one subject under two thirds of what it takes, and print what was predicted and what was allocated."""
    sys.path.insert(0, str(ROOT))
    subject = next(s for s in SUBJECTS if s.name == name)
    target = build(subject)
    if torch.cuda.is_available():
        machine = overflowml.detect()
    else:
        from tests.vdevice import Config, install

        install(Config(budget_bytes=2**36, hazards="raise"))
        machine = replace(overflowml.detect(), accelerators=(_virtual(),))
    session_detect(machine)
    network = overflowml.describe(target, subject.workload)
    whole = session.make_plan(network, Limits(quality="lossless"), subject.workload, machine)
    need = whole.estimate.device_peak_bytes
    plan = None
    for share in (0.6, 0.7, 0.8, 0.9):
        limits = Limits(device_memory=round(need * share), quality="lossless")
        try:
            plan = session.make_plan(network, limits, subject.workload, machine)
            break
        except overflowml.DoesNotFit:
            continue
    if plan is None:
        limits, plan = Limits(quality="lossless"), whole
    attached = overflowml.manage(target, limits, subject.workload)
    work(target, subject, machine.compute.torch_name)
    report = attached.report()
    print(
        json.dumps(
            {
                "strategy": attached.plan.strategy,
                "predicted": attached.plan.estimate.device_peak_bytes,
                "measured": report.device_peak_bytes,
                "budget": attached.plan.budget.device_bytes,
            }
        )
    )


def work(target: Any, subject: Subject, device: str) -> None:
    """What the subject is asked to do, as a user would have it done: a language model answers token after token."""
    if is_pipeline(target) or not target.can_generate() or target.config.is_encoder_decoder:
        run(target, subject, device)
        return
    prompt = torch.ones(subject.workload.batch, subject.workload.prompt_tokens or 1, dtype=torch.long, device=device)
    with torch.no_grad():
        output = target(input_ids=prompt, use_cache=True, logits_to_keep=1)
        for _ in range((subject.workload.new_tokens or 1) - 1):
            output = target(input_ids=prompt[:, :1], past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)


def _virtual() -> Any:
    from overflowml_core.facts import Accelerator

    return Accelerator("vgpu", "virtual accelerator", 0, 2**36, 2**36)


def session_detect(machine: Machine) -> None:
    """Make this machine the one that plans in this process are made for."""
    session.detect = lambda: machine  # type: ignore[assignment]
    from overflowml_core import planning

    planning.detect = lambda: machine  # type: ignore[assignment]


def peak_of(subject: Subject) -> dict[str, Any]:
    """What the child process found."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", subject.name],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=ROOT,
        env=os.environ,
    )
    if done.returncode:
        raise SystemExit(f"predict.py --peak {subject.name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---- everything


def measure(subjects: list[Subject], rounds: int, quick: bool) -> tuple[Report, list[dict[str, Any]]]:
    """Predict and measure; the report, and a row for each pass."""
    report = Report("predict")
    session.calibrate(quick=quick)
    rows: list[dict[str, Any]] = []
    weight_errors, peak_errors, time_errors, roofline_errors = [], [], [], []
    for subject in subjects:
        target = build(subject)
        rough = session.describe(target, subject.workload)
        roofline = predicted_seconds(rough, session.detect(), subject)
        device = session.detect().compute.torch_name
        target.to(device)
        run(target, subject, device)  # caches fill, kernels are prepared
        forecasts, taken = [], []
        for _ in range(1 if quick else CYCLES):  # the machine's speed drifts: predicting and measuring take turns
            machine = session.calibrate(quick=True, source=target, workload=subject.workload)
            forecasts.append(predicted_seconds(rough, machine, subject))
            taken += [run(target, subject, device) for _ in range(rounds)]
        predicted, measured = _medians(forecasts), _medians(taken)
        weight_error = abs(rough.weight_bytes - true_weight_bytes(target))
        del target
        gc.collect()
        peak = peak_of(subject)
        peak_error = abs(peak["predicted"] / peak["measured"] - 1)
        found, found_roofline = errors(predicted, measured), errors(roofline, measured)
        weight_errors.append(weight_error)
        peak_errors.append(peak_error)
        time_errors += map(abs, found.values())
        roofline_errors += map(abs, found_roofline.values())
        for key in found:
            rows.append(
                {
                    "model": subject.name,
                    "pass": ".".join(key),
                    "predicted_s": predicted[key],
                    "roofline_s": roofline[key],
                    "measured_s": measured[key],
                    "error": found[key],
                    "weights": rough.weight_bytes,
                    "weight_error": weight_error,
                    "peak_predicted": peak["predicted"],
                    "peak_measured": peak["measured"],
                    "strategy": peak["strategy"],
                }
            )
            print(f"{subject.name:18} {'.'.join(key):24} {predicted[key]:.4f} s of {measured[key]:.4f} s ({found[key]:+.1%})", flush=True)
        print(f"{subject.name:18} {'peak':24} {peak['predicted']} of {peak['measured']} ({peak_error:.2%}, {peak['strategy']})", flush=True)
    report.add("models", len(subjects), "models")
    report.add("weights.max_abs_error", max(weight_errors), "bytes")
    report.add("peak.max_rel_error", max(peak_errors), "ratio")
    report.add("time.max_rel_error", max(time_errors), "ratio")
    report.add("time.median_rel_error", statistics.median(time_errors), "ratio")
    report.add("time.roofline.max_rel_error", max(roofline_errors), "ratio")
    report.add("time.roofline.median_rel_error", statistics.median(roofline_errors), "ratio")
    return report, rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | pass | predicted | measured | error | weights | peak predicted | peak measured | under the budget |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row['predicted_s'] * 1e3:.1f} ms | {row['measured_s'] * 1e3:.1f} ms | {row['error']:+.1%}"
        sizes = f"{row['weights']} | {row['peak_predicted']} | {row['peak_measured']}"
        lines.append(f"| {row['model']} | {row['pass']} | {times} | {sizes} | {row['strategy']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="write the rows as Markdown")
    parser.add_argument("--only", help="names of models, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each model")
    parser.add_argument("--quick", action="store_true", help="twelve models, three runs each")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("OVERFLOWML_CACHE", cache)  # a calibration of a loaded machine must not stay
        if options.peak:
            measure_peak(options.peak)
            return
        chosen = [s for s in SUBJECTS if (not options.quick or s.quick) and (not options.only or s.name in options.only.split(","))]
        report, rows = measure(chosen, 3 if options.quick else options.rounds, options.quick)
        if options.table:
            options.table.write_text(table(rows), encoding="utf-8")
        report.write(options.json)


if __name__ == "__main__":
    main()
