"""A mixture of experts in less memory than it takes: ours, accelerate and everything resident; policies of the cache; predictions.

    python benchmarks/moe.py --model FOLDER --json benchmarks/results/moe.json --table benchmarks/results/moe.md

Parts: sides (answers of all sides under a third of the bytes, the hit rate against the optimum, policies on the same trace), predict
(seconds of a token over five sizes of the cache), cuda (a model of the size of Qwen3-30B-A3B on a CUDA device). Without --part all run that
can run here. Without --model a Qwen3-MoE of 5.1 GB is made, which takes a minute or two; a folder that has none yet is filled and kept. The
machine should do nothing else meanwhile. A side that fails is reported with its error; the others go on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import moe_contest
import moe_predict
import torch
from moe_contest import Answers, Contest, Settings, counted, differences, hit_rate
from moe_model import MoeShape, make_moe
from moe_policies import optimum
from moe_policies import table as policy_table
from moe_trace import Trace, joined, overlap, popularity, zipf_exponent
from report import Report
from stream_model import READY, weight_files
from stream_worker import SideFailed

from overflowml_core.errors import OverflowmlError
from overflowml_core.units import parse_bytes

PARTS = ("sides", "predict", "cuda")
CACHE_SHARES = (0.1, 0.2, 0.3, 0.45, 0.6)
"""Of all experts, in the predict part."""
QUICK = MoeShape(hidden=256, intermediate=256, layers=4, experts=64, per_token=4, heads=4, kv_heads=2, head=64, vocabulary=2000)
"""A model of 100 MB, to try the script."""


class Run:
    """One run: its report, its notes and its tables."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.report = Report("moe")
        self.notes: list[str] = []
        self.tables: list[tuple[str, str]] = []
        self._shape = QUICK if options.quick else MoeShape()
        self._calibrated = False

    def settings(self) -> Settings:
        """Of the sides and predict parts; makes the model where there is none."""
        options = self.options
        model = Path(options.model) if options.model else self.work / "model"
        if not (model / READY).exists() and not list(model.glob("*.safetensors")):
            print(f"# making a model in {model}", file=sys.stderr, flush=True)
            make_moe(model, self._shape)
        weight_files(model)
        config = json.loads((model / "config.json").read_text("utf-8"))
        settings = Settings(
            model=model.resolve(),
            work=self.work,
            budget_bytes=parse_bytes(options.budget, "--budget"),
            allowance_bytes=parse_bytes(options.allowance, "--allowance"),
            prompt_tokens=options.prompt,
            new_tokens=options.new,
            slow_tokens=options.slow,
            turns=options.turns,
            vocabulary=config["vocab_size"],
            sides=tuple(options.sides.split(",")),
            threads=options.threads,
        )
        if not self._calibrated:
            self._calibrated = True
            try:
                print(f"# calibrated in {moe_predict.calibrate(settings):.0f} s", file=sys.stderr, flush=True)
            except SideFailed as error:
                self.notes.append(f"no calibration: {error}")
        return settings

    def sides(self) -> None:
        """Answers of all sides, the optimum, and the policies."""
        settings = self.settings()
        with Contest(settings, self.notes) as contest:
            contest.run()
            results = contest.results
            rate = statistics.median(contest.rates)
            traces = {name: contest.traces(name) for name in results}
            differing = differences(contest, settings)
        report = self.report
        report.add("weights_bytes", sum(file.stat().st_size for file in weight_files(settings.model)), "bytes")
        report.add("budget_bytes", settings.budget_bytes, "bytes")
        report.add("limit_bytes", settings.limit_bytes, "bytes, with the interpreter and pages of files")
        report.add("direct_rate", rate, "bytes/s")
        add_figures(report, results, rate)
        for name, (most, same) in differing.items():
            report.add(f"{name}.max_abs_difference", most, "of a logit, from resident")
            report.add(f"{name}.tokens_equal", same, "of the tokens that resident takes for the next one")
        self.tables.append(("Sides", moe_contest.table(results)))
        if results.get("ours") and traces.get("ours"):
            self._policies(results["ours"], traces["ours"])

    def _policies(self, ours: Answers, traces: list[Trace]) -> None:
        """What the cache found, the most that any could, and what others find on the same trace."""
        found = hit_rate(ours.told)
        trace = joined(traces)
        shape = popularity(traces[-1])
        self.report.add("routing.zipf_exponent", zipf_exponent(shape), "of the shares of a bank's experts within one answer")
        self.report.add("routing.overlap", overlap(traces[-1]), "of a token's experts that the one before used")
        experts = ours.told[-1][1].get("experts") if ours.told else None
        sizes = sorted({max(1, round(share * trace.expert_count)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2)})
        if experts and found is not None:
            self.report.add("cache.slots", experts["slots"], "experts")
            self.report.add("cache.hit_rate", found, "of the experts that tokens asked for; those brought ahead of time are none")
            self.report.add("cache.hit_rate_optimum", optimum(trace, experts["slots"]).rate, "of them, by knowing all that comes")
            ahead = counted(ours.told, "prefetch_hits") / counted(ours.told, "requests")
            self.report.add("cache.brought_ahead", ahead, "of them that were on their way or there before they were asked for")
            self.report.add("cache.half_life", experts["half_life"], "tokens, at the end")
            sizes = sorted({*sizes, experts["slots"]})
        else:
            self.notes.append("ours: its plan keeps no experts apart, so that no hits were counted")
        before = traces[0] if len(traces) > 1 else None
        after = joined(traces[1:]) if len(traces) > 1 else trace
        self.tables.append((f"Hit rates of policies over the tokens of {len(traces[1:]) or 1} answers", policy_table(after, sizes, before)))

    def predict(self) -> None:
        """Tokens over five sizes of the cache."""
        settings = self.settings()
        config = json.loads((settings.model / "config.json").read_text("utf-8"))
        expert_bytes = 3 * 2 * config["hidden_size"] * config["moe_intermediate_size"]
        bank_bytes = config["num_hidden_layers"] * config["num_experts"] * expert_bytes
        budgets = moe_predict.budgets_of(settings, CACHE_SHARES, bank_bytes)
        moe_predict.first_session(settings)
        sizes = moe_predict.measure(settings, budgets, self.report, self.notes)
        self.tables.append(("Predictions", moe_predict.table(sizes)))

    def cuda(self) -> None:
        """On an accelerator."""
        import moe_cuda

        self.tables += moe_cuda.measure(moe_cuda.settings_of(self.options), self.report, self.notes)

    def write(self) -> None:
        """The JSON and the table, where they were asked for."""
        if self.options.json:
            document = {**self.report.document(), "notes": self.notes}
            self.options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if self.options.table:
            parts = [f"## {title}\n\n{text}" for title, text in self.tables]
            if self.notes:
                parts.append("## Notes\n\n" + "\n".join(f"- {' '.join(note.split())}" for note in self.notes) + "\n")
            self.options.table.write_text("\n".join(parts), encoding="utf-8")


def add_figures(report: Report, results: dict[str, Answers], rate_bytes_per_s: float) -> None:
    """Figures of the sides that answered: seconds, bytes, and ours against the others and against the limit.

    Args:
        report: gets them.
        results: by side.
        rate_bytes_per_s: what the disk can do.
    """
    timed = {name: result for name, result in results.items() if result.seconds}
    for name, result in timed.items():
        report.add(f"{name}.tokens_per_s", 1 / result.token_s, "tokens/s")
        report.add(f"{name}.prefill_s", result.prompt_s, "s")
        report.add(f"{name}.token_read_bytes", statistics.fmean(result.read_bytes), "bytes a token")
        report.add(f"{name}.prefill_read_bytes", statistics.median(result.prefill_read_bytes), "bytes a prefill")
        report.add(f"{name}.anonymous_peak_bytes", result.anonymous_peak_bytes, "bytes")
    ours = timed.get("ours")
    if ours is None:
        return
    # What is reckoned against the limit is what the engine fetched or, where the kernel counts less, that.
    fetched = counted(ours.told, "fetched_bytes") / len(ours.seconds)
    read_bytes = min(fetched or statistics.fmean(ours.read_bytes), statistics.fmean(ours.read_bytes) or fetched)
    if "accelerate" in timed:
        report.add("decode.vs_accelerate", timed["accelerate"].token_s / ours.token_s, "times as fast")
        report.add("prefill.vs_accelerate", timed["accelerate"].prompt_s / ours.prompt_s, "times as fast")
    if "resident" in timed:
        report.add("decode.vs_resident", timed["resident"].token_s / ours.token_s, "times as fast")
        report.add("prefill.vs_resident", timed["resident"].prompt_s / ours.prompt_s, "times as fast")
        limit_s = max(timed["resident"].token_s, read_bytes / rate_bytes_per_s)
        report.add("decode.limit_s", limit_s, "s a token: resident's computing, or what was read at the direct rate")
        report.add("decode.share_of_limit", limit_s / ours.token_s, "of the limit's rate")


def parts_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The parts to run: those asked for, else all that can run here."""
    return tuple(options.part) if options.part else tuple(part for part in PARTS if part != "cuda" or torch.cuda.is_available())


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", action="append", choices=PARTS, help="may be given more than once")
    made.add_argument("--model", help="folder of a Qwen3-MoE in safetensors; made there where it is missing or empty")
    made.add_argument("--budget", default="1.6GB", help="of each side in the sides part")
    made.add_argument("--allowance", default="1GB", help="memory of a process beside its budget: the interpreter and its libraries")
    made.add_argument("--prompt", type=int, default=160, help="tokens of a prompt")
    made.add_argument("--new", type=int, default=64, help="tokens of an answer")
    made.add_argument("--slow", type=int, default=2, help="tokens of an answer of accelerate's")
    made.add_argument("--turns", type=int, default=3, help="answers of each side")
    made.add_argument("--sides", default=",".join(moe_contest.SIDES), help="of the sides part, separated by commas")
    made.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves them to torch")
    made.add_argument("--device", help="of the cuda part; cpu tries the script on a small model")
    made.add_argument("--layers", type=int, help="of the cuda part's model; without it as many as RAM holds, at most 48")
    made.add_argument("--cuda-budget", default="16GB", help="of the cuda part")
    made.add_argument("--work", type=Path, help="for a model, logs and offloaded weights; a temporary folder without it")
    made.add_argument("--keep", action="store_true", help="leave what was put into the work folder")
    made.add_argument("--json", type=Path)
    made.add_argument("--table", type=Path, help="write the rows as Markdown")
    made.add_argument("--quick", action="store_true", help="a model of 100 MB under 35 MB, two turns: tries the script, measures nothing")
    return made


def main() -> None:
    """Read the arguments, measure, write, clean up."""
    options = parser().parse_args()
    if options.quick:
        options.turns, options.prompt, options.new = 2, 24, 8
        options.budget = options.budget if options.model else "35MB"
    # A run that is ended from outside cleans up as one that is interrupted.
    signal.signal(signal.SIGTERM, _interrupted)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="overflowml-moe-", dir=options.work))
    try:
        run = Run(options, work)
        steps: dict[str, Callable[[], None]] = {name: getattr(run, name) for name in PARTS}
        for part in parts_of(options):
            try:
                steps[part]()
            except (OSError, ImportError, OverflowmlError, SideFailed) as error:
                run.notes.append(f"{part}: {type(error).__name__}: {error}")
                print(run.notes[-1], file=sys.stderr, flush=True)
        run.write()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
