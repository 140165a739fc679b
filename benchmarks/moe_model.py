"""Makes a folder with a Qwen3-MoE of random bfloat16 weights and a router as skewed as trained ones are, and texts to ask it.

Note [skew]. What a router of random rows chooses is near to uniform, which no trained model is; and a model of random weights that writes
greedily soon goes round in a circle of a few tokens, which flatters every cache. So both are made:

* All embeddings share a constant vector, beside a random one for each token. A router's row is a random direction, by which the choice
  depends on the token and, through attention, on what stands before it, and a multiple of the constant vector, by which an expert is liked
  or not whatever the token is: as much as would make the share of its tokens a Zipf distribution over its rank, times ``static``. Ranks are
  shuffled in each layer. Attention does not see the constant vector, so that what it adds is the text's own.
* A text is given, not written: half of its tokens come from a Zipf distribution over the vocabulary that all texts share, half from a short
  list of its own, its topic. What a model says of the next token is compared, but the text goes on as it stands.

Measured with the default model over 32 tokens behind prompts of 160, for two texts: the shares of a layer's experts fall with their rank
to the power of 1.1 and 1.2; a token uses 23 and 29 % of the experts of the one before; a least-recently-used cache of an eighth of all
experts finds 40 and 43 %, one of a quarter 63 and 69 %, one of half 87 %; a list of a sixteenth, made from the other text, finds 16 and
18 %, of which 6 would be chance. Published figures are of that kind and a little kinder to a cache: 67 % with an eighth of 512 experts,
81 % with a quarter, 10 % for a list of a sixteenth (llama.cpp, pull request 27861), while 10 % of the experts may take 80 % of the tokens
of one text (pull request 24524).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from stream_model import READY, SHARD_BYTES

_STD = 0.02
_EXPERT_STD = 0.03


@dataclass(frozen=True)
class Skew:
    """How the router is skewed; see note [skew].

    Attributes:
        exponent: of the Zipf distribution.
        static: how much of it an expert is liked by whatever the token is; 0 leaves it to token and text.
        constant: share of an embedding's energy that all tokens have in common.
        context: how much a layer's attention adds, where all tokens before are the same: in lengths of an embedding.
        topic: share of a text's tokens that come from its own list.
        topic_tokens: in that list.
    """

    exponent: float = 1.0
    static: float = 0.4
    constant: float = 0.5
    context: float = 0.7
    topic: float = 0.5
    topic_tokens: int = 48


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a Qwen3-MoE. The default has 5.1 GB of weights in the proportions of Qwen3-30B-A3B.

    That has 128 experts a layer, too, and uses 8 for a token; 95 % of its bytes are experts.
    """

    hidden: int = 1024
    intermediate: int = 384
    layers: int = 16
    experts: int = 128
    per_token: int = 8
    heads: int = 16
    kv_heads: int = 2
    head: int = 128
    vocabulary: int = 16000
    skew: Skew = Skew()

    def config(self) -> dict[str, object]:
        """As transformers' config.json has it."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate * 4,
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes as the Hub has them, one tensor for each expert, in the order in which a pass needs them."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (query, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (key, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (key, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, query)
            yield f"{prefix}.self_attn.q_norm.weight", (self.head,)
            yield f"{prefix}.self_attn.k_norm.weight", (self.head,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate.weight", (self.experts, self.hidden)
            for expert in range(self.experts):
                yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (self.intermediate, self.hidden)
                yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (self.intermediate, self.hidden)
                yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return 3 * 2 * self.hidden * self.intermediate

    @property
    def bank_bytes(self) -> int:
        """Of all experts of all layers."""
        return self.layers * self.experts * self.expert_bytes


class Weights:
    """Draws weights; drawn in the same order on the same device they are the same.

    Args:
        shape: of the model.
        device: that draws them, and has them then.
    """

    def __init__(self, shape: MoeShape, device: torch.device | str = "cpu") -> None:
        self._shape = shape
        self._device = torch.device(device)
        self._generator = torch.Generator(self._device).manual_seed(0)
        found = self._normal((shape.hidden,))
        self._constant = found / found.norm()

    def _normal(self, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, generator=self._generator, device=self._device)

    def draw(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        """A tensor for a name, bfloat16."""
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16, device=self._device)
        if name.endswith("embed_tokens.weight"):
            return self._embeddings(size).bfloat16()
        if name.endswith("mlp.gate.weight"):
            return self._router(size).bfloat16()
        if name.endswith("v_proj.weight"):
            return self._blind(self._normal(size) * self._attention_std()).bfloat16()
        std = self._attention_std() if name.endswith("o_proj.weight") else _EXPERT_STD if ".experts." in name else _STD
        return torch.empty(size, dtype=torch.bfloat16, device=self._device).normal_(0, std, generator=self._generator)

    def _blind(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows less what they have of the constant vector."""
        return rows - (rows @ self._constant).outer(self._constant)

    def _attention_std(self) -> float:
        """So that values averaged over the text, of length 1 an entry, come out ``context`` long."""
        skew, shape = self._shape.skew, self._shape
        return math.sqrt(skew.context) / (shape.hidden * shape.heads * shape.head) ** 0.25

    def _embeddings(self, size: tuple[int, ...]) -> torch.Tensor:
        share, hidden = self._shape.skew.constant, self._shape.hidden
        own = self._normal(size)
        return share**0.5 * hidden**0.5 * self._constant + (1 - share) ** 0.5 * own

    def _router(self, size: tuple[int, ...]) -> torch.Tensor:
        rows = self._blind(self._normal(size)) / self._shape.hidden**0.5
        rank = torch.randperm(size[0], generator=self._generator, device=self._device) + 1
        chosen = rank**-self._shape.skew.exponent
        chosen = (chosen * self._shape.per_token / chosen.sum()).clamp(max=0.9)
        liking = self._shape.skew.static * torch.special.ndtri(chosen)
        # Hidden states are of length sqrt(hidden) when a router sees them, and a share of that is the constant vector.
        along = (self._shape.hidden * self._shape.skew.constant) ** 0.5
        return rows + ((liking - liking.mean()) / along).outer(self._constant)


def make_moe(folder: Path, shape: MoeShape = MoeShape(), shard_bytes: int = SHARD_BYTES) -> int:
    """Write the model; one shard at a time is in memory. Returns the bytes of its weights.

    Args:
        folder: made where it is missing; files of the same names are written over.
        shape: of the model.
        shard_bytes: most weights in one file.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    (folder / "skew.json").write_text(json.dumps(asdict(shape.skew)), encoding="utf-8")
    groups = _shards(shape, shard_bytes)
    where: dict[str, str] = {}
    total_bytes = 0
    weights = Weights(shape)
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: weights.draw(name, size) for name, size in group}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / READY).write_text(str(total_bytes), encoding="ascii")
    return total_bytes


def _shards(shape: MoeShape, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The weights in groups of at most so many bytes, or of one weight."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = []
    room_bytes = 0
    for name, size in shape.weights():
        nbytes = 2 * torch.Size(size).numel()
        if not groups or nbytes > room_bytes:
            groups.append([])
            room_bytes = shard_bytes
        groups[-1].append((name, size))
        room_bytes -= nbytes
    return groups


def text_of(length: int, vocabulary: int, seed: int, skew: Skew = Skew()) -> list[int]:
    """Ids of a text: see note [skew].

    Args:
        length: in tokens.
        vocabulary: of the model.
        seed: another one gives another text, about another topic.
        skew: says how much of it belongs to the topic.
    """
    generator = torch.Generator().manual_seed(seed)
    everywhere = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    # Which tokens are the common ones is the same for all texts.
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    common = order[torch.multinomial(everywhere, length, replacement=True, generator=generator)]
    listed = torch.randperm(vocabulary, generator=generator)[: skew.topic_tokens]
    own = listed[torch.multinomial(everywhere[: len(listed)], length, replacement=True, generator=generator)]
    is_own = torch.rand(length, generator=generator) < skew.topic
    found: list[int] = torch.where(is_own, own, common).tolist()
    return found
