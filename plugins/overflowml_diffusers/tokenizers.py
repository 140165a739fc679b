"""Tokenizers that read no text: they answer with as many tokens as a workload says, so that real pipelines run without vocabularies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from overflowml_core.activations import ASSUMED_TEXT_TOKENS

_WORDS = re.compile(r"\w+|[^\w\s]")
_CLIP_TOKENS = 77
"""Positions of every CLIP text encoder that pipelines use."""

_SHORT_TOKENS = 8
"""Tokens of a text that a pipeline reads without a limit, to see whether it was cut: fewer than any limit, so that nothing was."""


class Encoding(dict[str, Any]):
    """What a tokenizer returns: a mapping whose entries are attributes too, and which moves as one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: Any, **kwargs: Any) -> Encoding:
        """The same on another device; of tensors only."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(*args, **kwargs)
        return self


class StubTokenizer:
    """Stands where a pipeline has a tokenizer (or a processor of text). Every token is 0 and every token counts.

    Args:
        tokens: length of a prompt that is not padded.
        model_max_length: what the pipeline is told that the text encoder takes.
    """

    pad_token = eos_token = bos_token = unk_token = ""
    pad_token_id = eos_token_id = bos_token_id = unk_token_id = image_token_id = 0
    padding_side = "right"
    added_tokens_encoder: Mapping[str, int] = {}

    def __init__(self, tokens: int = ASSUMED_TEXT_TOKENS, model_max_length: int = ASSUMED_TEXT_TOKENS) -> None:
        self.tokens = tokens
        self.model_max_length = model_max_length

    @property
    def tokenizer(self) -> StubTokenizer:
        """A processor's own tokenizer."""
        return self

    def __len__(self) -> int:
        return 1

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Encoding:
        """Zeros ``[batch, tokens]`` and ones of the same size; as long as the padding and the limits say."""
        texts = kwargs.get("text", text)
        batch = 1 if texts is None or isinstance(texts, str) else max(len(texts), 1)
        length = self._length(kwargs.get("padding", False), kwargs.get("max_length"), bool(kwargs.get("truncation")))
        return self._encoding(batch, length, kwargs)

    def _length(self, padding: object, max_length: int | None, truncation: bool) -> int:
        if padding == "max_length":
            return max_length or self.model_max_length
        if max_length is not None:
            return min(self.tokens, max_length)
        return min(self.tokens, self.model_max_length) if truncation else min(self.tokens, _SHORT_TOKENS)

    def _encoding(self, batch: int, length: int, options: Mapping[str, Any]) -> Encoding:
        ids: Any = torch.zeros(batch, length, dtype=torch.long)
        mask: Any = torch.ones(batch, length, dtype=torch.long)
        lengths: Any = torch.full((batch,), length, dtype=torch.long)
        if options.get("return_tensors") is None:
            ids, mask, lengths = ids.tolist(), mask.tolist(), lengths.tolist()
        encoding = Encoding(input_ids=ids)
        if options.get("return_attention_mask", True) is not False:
            encoding["attention_mask"] = mask
        if options.get("return_length"):
            encoding["length"] = lengths
        return encoding

    def apply_chat_template(self, conversation: Any = None, *args: Any, **kwargs: Any) -> Any:
        """One text, or its tokens where they are asked for."""
        nested = isinstance(conversation, Sequence) and conversation and not isinstance(conversation[0], Mapping)
        if kwargs.get("tokenize", True) is False:
            return ["" for _ in conversation] if nested else ""
        encoding = self("" if not nested else ["" for _ in conversation], **{"truncation": True, **kwargs})
        return encoding if kwargs.get("return_dict", True) else encoding["input_ids"]

    def encode(self, text: str, *args: Any, **kwargs: Any) -> Any:
        """As many tokens as a text has words and signs."""
        ids = [0] * max(len(_WORDS.findall(text)), 1)
        return torch.tensor([ids]) if kwargs.get("return_tensors") == "pt" else ids

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        """Words and signs."""
        return _WORDS.findall(text)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """No text."""
        return ""

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """No texts."""
        return ["" for _ in sequences]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """0 for each."""
        return 0 if isinstance(tokens, str) else [0 for _ in tokens]


def stub_for(name: str, components: Mapping[str, Any], tokens: int | None = None) -> StubTokenizer:
    """The stub for a pipeline's tokenizer.

    Args:
        name: of the tokenizer in the pipeline; "tokenizer_2" belongs to "text_encoder_2".
        components: of the pipeline.
        tokens: of a prompt; None takes :data:`ASSUMED_TEXT_TOKENS`.
    """
    encoder = components.get(re.sub(r"tokenizer|processor", "text_encoder", name, count=1))
    config = getattr(encoder, "config", None)
    config = getattr(config, "text_config", None) or config
    positions = getattr(config, "max_position_embeddings", None)
    longest = positions if isinstance(positions, int) and 0 < positions <= _CLIP_TOKENS else ASSUMED_TEXT_TOKENS
    return StubTokenizer(tokens or ASSUMED_TEXT_TOKENS, longest)
