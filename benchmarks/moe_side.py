"""One side of the benchmark of mixtures of experts, in a process of its own: loads the model in its way and answers when it is told to.

Started by stream_worker.py; reads and answers commands as stream_side.py does. An answer is a prefill of a prompt and then one pass for
each token of a text that is given: what the model says comes next is noted, and the text goes on as it stands (moe_model.py says why).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_trace import Recorder
from stream_side import Accelerate, Host, Ours, Plain, serve
from stream_system import read_bytes_of


class Experts(Ours):
    """overflowml under a budget, with its experts apart."""

    def told(self) -> dict[str, Any]:
        """What the engine says of itself, and what it counted of experts; no experts where its plan keeps none apart."""
        found = super().told()
        # Where everything fits there is no engine that could count.
        report = getattr(self.attachment, "expert_report", lambda: None)()
        found["expert_cache_bytes"] = sum(phase.expert_cache_bytes for phase in self.attachment.plan.phases)
        if report is not None:
            found["experts"] = {
                "requests": report.requests,
                "hits": sum(bank.hits for bank in report.banks),
                "fetched_bytes": report.fetched_bytes,
                **{name: value for name, value in asdict(report).items() if name != "banks"},
            }
        return found


class Resident(Plain):
    """transformers' own load, which stacks experts in memory of its own; what it left in files is copied, too."""

    def __init__(self, command: dict[str, Any]) -> None:
        super().__init__(command)
        for name, parameter in self.model.named_parameters():
            if ".experts." not in name:
                parameter.data = parameter.data.clone()


SIDES: dict[str, Callable[[dict[str, Any]], Any]] = {"ours": Experts, "accelerate": Accelerate, "resident": Resident}


class MoeHost(Host):
    """Carries out commands."""

    def load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Load the model in the side's way, and listen at its routers."""
        began = time.perf_counter()
        self.side = SIDES[command["side"]](command)
        self.side.model.eval()
        seconds = time.perf_counter() - began
        config = self.side.model.config
        self.recorder = Recorder(config.num_experts, config.num_experts_per_tok)
        self.recorder.watch([layer.mlp.gate for layer in self.side.model.model.layers])
        return {"seconds": seconds, "told": self.side.told()}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Answer once: seconds and bytes that the disk read for the prefill and for each token, what came out, what the side says."""
        import torch
        from transformers import DynamicCache

        model, text = self.side.model, command["text"]
        cache = DynamicCache(config=model.config)
        logits = []
        marks = [self._mark()]
        told = []
        with torch.inference_mode():
            for number, ids in enumerate([command["prompt"], *([token] for token in text)]):
                found = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits.append(found.logits[0, -1])
                marks.append(self._mark())
                if number == 0:
                    # Not timed: asking an engine for its counts takes a moment.
                    told.append(self.side.told())
                    marks.append(self._mark())
        told.append(self.side.told())
        if command.get("logits"):
            Path(command["logits"]).write_bytes(torch.stack(logits).float().contiguous().numpy().tobytes())
        if command.get("trace"):
            self.recorder.take().write(Path(command["trace"]))
        spans = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(marks)]
        (prefill_s, prefill_bytes), _, *tokens = spans
        return {
            "prefill_s": prefill_s,
            "prefill_read_bytes": prefill_bytes,
            "seconds": [seconds for seconds, _ in tokens],
            "read_bytes": [nbytes for _, nbytes in tokens],
            "said": [int(one.argmax()) for one in logits],
            "told_before": told[0],
            "told": told[1],
        }

    def quit(self, command: dict[str, Any]) -> dict[str, Any]:
        """Let the model go as a user would, so that what was counted of its experts is kept, and end."""
        if isinstance(self.side, Experts):
            import overflowml

            overflowml.release(self.side.model)
        return super().quit(command)

    def calibrate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Measure this machine and the model's own operations, and keep that where all sides of a run find it."""
        from overflowml_core import session

        began = time.perf_counter()
        session.calibrate(quick=True, source=command["model"], workload=self._workload(command))
        return {"seconds": time.perf_counter() - began}

    def predict(self, command: dict[str, Any]) -> dict[str, Any]:
        """What the plan for a budget says of passes, before anything is loaded."""
        import torch

        import overflowml

        limits = overflowml.Limits.exactly(device_memory=command["budget_bytes"], quality="lossless")
        plan = overflowml.plan(command["model"], limits, self._workload(command), dtype=torch.bfloat16)
        return {
            "strategy": plan.strategy,
            "expert_cache_bytes": sum(phase.expert_cache_bytes for phase in plan.phases),
            "token_s": plan.estimate.token_s,
            "passes": {one.name: one.pass_s for phase in plan.phases for one in phase.passes},
            "hit_rates": {one.name: one.expert_hit_rate for phase in plan.phases for one in phase.passes},
            "missed_bytes": {one.name: one.missed_expert_bytes for phase in plan.phases for one in phase.passes},
        }

    def _workload(self, command: dict[str, Any]) -> Any:
        from overflowml_core.facts import Workload

        return Workload(prompt_tokens=command["prompt_tokens"], new_tokens=command["new_tokens"])

    def _mark(self) -> tuple[float, int]:
        return time.perf_counter(), read_bytes_of(os.getpid()) or 0


if __name__ == "__main__":
    serve(MoeHost())
