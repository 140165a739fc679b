"""One side of the disk and load parts, in a process of its own: loads a model in its way and runs passes when it is told to.

Started by stream_worker.py, by an interpreter that need not have overflowml. Reads one JSON command a line from standard input and
answers each with one JSON line on the standard output that it was started with; what libraries print goes to standard error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKEN = 17
"""What a pass is asked about: one token, batch 1."""


class Ours:
    """overflowml under a budget; on a machine without an accelerator the budget is RAM and the rest is read from the files."""

    def __init__(self, command: dict[str, Any]) -> None:
        import torch
        import transformers

        import overflowml

        limits = overflowml.Limits.exactly(device_memory=command["budget_bytes"], quality="lossless")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(command["model"], overflow=limits, dtype=torch.bfloat16)
        self.attachment = overflowml.attachment(self.model)

    def told(self) -> dict[str, Any]:
        """What the engine says of itself."""
        plan, report = self.attachment.plan, self.attachment.report()
        blocks = [(p.stored_bytes, p.tier.value) for phase in plan.phases for p in phase.placements]
        return {
            "strategy": plan.strategy,
            "budget_bytes": plan.budget.device_bytes,
            "peak_bytes": report.device_peak_bytes,
            "streamed_bytes": report.streamed_bytes,
            "planned_streamed_bytes": plan.estimate.streamed_bytes,
            "block_bytes": max((nbytes for nbytes, _ in blocks), default=0),
            "block_count": len(blocks),
            "tiers": sorted({tier for _, tier in blocks}),
        }


class Accelerate:
    """accelerate's disk offload as transformers' users reach it: an automatic device map with a limit for the CPU."""

    def __init__(self, command: dict[str, Any]) -> None:
        import torch
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            command["model"],
            device_map="auto",
            max_memory={"cpu": command["budget_bytes"]},
            offload_folder=command["scratch"],
            dtype=torch.bfloat16,
        )

    def told(self) -> dict[str, Any]:
        """How many of its modules are where."""
        places = [str(place) for place in self.model.hf_device_map.values()]
        return {place: places.count(place) for place in sorted(set(places))}


class Plain:
    """transformers' own load, which maps the files into memory and reads nothing until it is used."""

    def __init__(self, command: dict[str, Any]) -> None:
        import torch
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(command["model"], dtype=torch.bfloat16)

    def told(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}


class Resident(Plain):
    """The same, with every weight copied to memory of its own: the bound that computing sets."""

    def __init__(self, command: dict[str, Any]) -> None:
        super().__init__(command)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()


class AirLLM:
    """AirLLM, which wants a file a layer, made at the first load, and a tokenizer, which it does not use here."""

    def __init__(self, command: dict[str, Any]) -> None:
        scratch = Path(command["scratch"])
        model = scratch / "model"
        if not model.exists():
            _with_tokenizer(Path(command["model"]), model)
        from airllm import AutoModel

        self.whole = AutoModel.from_pretrained(str(model), device="cpu", layer_shards_saving_path=str(scratch / "split"))
        self.model = self.whole.model

    def told(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}


def _with_tokenizer(source: Path, target: Path) -> None:
    """A folder with links to a model's files and a tokenizer of two words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    target.mkdir(parents=True)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(target)
    for file in source.iterdir():
        if file.is_file() and not (target / file.name).exists():
            (target / file.name).symlink_to(file.resolve())


SIDES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ours": Ours,
    "accelerate": Accelerate,
    "mmap": Plain,
    "airllm": AirLLM,
    "resident": Resident,
}


class Host:
    """Carries out commands."""

    def __init__(self) -> None:
        self.side: Any = None

    def ready(self, command: dict[str, Any]) -> dict[str, Any]:
        """Import everything that a load needs, so that what is measured afterwards is the load."""
        import importlib

        import torch

        for name in command["imports"]:
            importlib.import_module(name)
        if command["threads"]:
            torch.set_num_threads(command["threads"])
        return {"pid": os.getpid(), "threads": torch.get_num_threads(), "versions": _versions(["torch", *command["imports"]])}

    def load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Load the model in the side's way."""
        began = time.perf_counter()
        self.side = SIDES[command["side"]](command)
        self.side.model.eval()
        return {"seconds": time.perf_counter() - began, "told": self.side.told()}

    def passes(self, command: dict[str, Any]) -> dict[str, Any]:
        """Passes one behind the other: seconds of each, bytes that the disk read for each, and what the side says of itself."""
        import torch

        tokens = torch.full((1, 1), TOKEN)
        seconds, read_bytes = [], []
        with torch.inference_mode():
            # Directly in front of the others: in a pause, a side would fetch ahead in time that nobody counts.
            for _ in range(command["untimed"]):
                self.side.model(input_ids=tokens, use_cache=False)
            for _ in range(command["count"]):
                before, began = _read_bytes(), time.perf_counter()
                logits = self.side.model(input_ids=tokens, use_cache=False).logits
                seconds.append(time.perf_counter() - began)
                read_bytes.append(_read_bytes() - before)
        if command.get("logits"):
            Path(command["logits"]).write_bytes(logits[0, -1].float().contiguous().numpy().tobytes())
        return {"seconds": seconds, "read_bytes": read_bytes, "told": self.side.told()}

    def forget(self, command: dict[str, Any]) -> dict[str, Any]:
        """Let go of pages of mapped files, so that the page cache can forget them."""
        return {"ranges": _unmap_pages({os.path.realpath(file) for file in command["files"]})}

    def quit(self, command: dict[str, Any]) -> dict[str, Any]:
        """Let the model go, and end."""
        self.side = None
        gc.collect()
        return {}


def _versions(names: list[str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_bytes() -> int:
    """Bytes that this process had the disk read; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/io").read_text("ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes:")), 0)


def _unmap_pages(files: set[str]) -> int:
    """Have the kernel drop this process's pages of mapped files, which come back from the file when they are touched."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    count = 0
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0] in files:
            start, end = (int(part, 16) for part in span.split("-"))
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED) == 0:
                count += 1
    return count


def serve(host: Host) -> None:
    """Have a host carry out commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(host, command["do"])(command)
        except Exception as error:  # noqa: BLE001 -- whatever a side fails with is its result
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
        if command["do"] == "quit":
            return


if __name__ == "__main__":
    serve(Host())
