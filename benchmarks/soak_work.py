"""What soak.py runs again and again: pictures of a small Flux pipeline and answers of a small Llama, of the real classes with random
weights. Every picture and every answer has a size and a seed of its own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from overflowml import Workload


@dataclass(frozen=True)
class Item:
    """One picture, or answers to some prompts at once.

    Attributes:
        seed: of its noise or of what is drawn from its logits.
        prompts: tokens of each.
        size: height and width in pixels, or new tokens.
    """

    seed: int
    prompts: tuple[tuple[int, ...], ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Scale:
    """How large the models are; a picture's sides are ``pixels`` times 2, 3 or 4, up to ``answers`` at
    once are of up to ``new_tokens``."""

    heads: int
    head_dim: int
    layers: int
    pixels: int
    prompt_tokens: int
    new_tokens: int
    answers: int
    vocabulary: int
    dtype: torch.dtype


SMALL = Scale(heads=4, head_dim=16, layers=6, pixels=16, prompt_tokens=24, new_tokens=60, answers=32, vocabulary=512, dtype=torch.float32)
"""A picture takes less than a second on one core and the virtual accelerator."""
TINY = Scale(heads=2, head_dim=16, layers=3, pixels=8, prompt_tokens=8, new_tokens=12, answers=2, vocabulary=64, dtype=torch.float32)
MIDDLE = Scale(heads=8, head_dim=64, layers=10, pixels=16, prompt_tokens=32, new_tokens=40, answers=4, vocabulary=8192, dtype=torch.float32)
"""A hundred megabytes and more of weights, beside which an interpreter's own memory counts little."""
LARGE = Scale(
    heads=24,
    head_dim=128,
    layers=10,
    pixels=256,
    prompt_tokens=512,
    new_tokens=256,
    answers=8,
    vocabulary=32768,
    dtype=torch.bfloat16,
)
"""Some gigabytes, for a GPU."""


class Work(Protocol):
    """One kind of work."""

    name: str
    unit: str
    workload: Workload
    options: dict[str, Any]

    def make(self) -> Any:
        """The model, always with the same weights."""
        ...

    def load(self, folder: Path) -> Any:
        """The model from its folder."""
        ...

    def items(self, units: int) -> list[Item]:
        """So many units of work; the same ones each time."""
        ...

    def run(self, model: Any, item: Item, device: torch.device) -> torch.Tensor:
        """The result of an item, on the CPU."""
        ...

    def units(self, item: Item) -> int:
        """How many units an item is."""
        ...

    def extents(self, item: Item) -> tuple[int, ...]:
        """What the memory that it takes grows with."""
        ...


class Pictures:
    """Pictures of a Flux pipeline; a unit is one of them."""

    name, unit = "images", "generations"

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        most = 4 * scale.pixels
        self.options: dict[str, Any] = {"tokenizer": None, "tokenizer_2": None, "dtype": scale.dtype}
        self.workload = Workload(height=most, width=most, steps=2, prompt_tokens=scale.prompt_tokens)

    def make(self) -> Any:
        """See :class:`Work`."""
        import diffusers as df
        import transformers as tf

        scale = self._scale
        width = scale.heads * scale.head_dim
        torch.manual_seed(5)
        clip = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": scale.heads, "num_hidden_layers": scale.layers}
        ends = {"bos_token_id": 0, "eos_token_id": 2, "projection_dim": width, "max_position_embeddings": 77}
        t5 = {"d_model": width, "d_kv": scale.head_dim, "d_ff": 2 * width, "num_layers": scale.layers, "num_heads": scale.heads}
        rotary = scale.head_dim // 8
        pipe = df.FluxPipeline(
            scheduler=df.FlowMatchEulerDiscreteScheduler(),
            text_encoder=tf.CLIPTextModel(tf.CLIPTextConfig(**clip, **ends, vocab_size=scale.vocabulary)),
            tokenizer=None,
            text_encoder_2=tf.T5EncoderModel(tf.T5Config(**t5, vocab_size=scale.vocabulary)),
            tokenizer_2=None,
            transformer=df.FluxTransformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=scale.layers // 2,
                num_single_layers=scale.layers,
                attention_head_dim=scale.head_dim,
                num_attention_heads=scale.heads,
                joint_attention_dim=width,
                pooled_projection_dim=width,
                axes_dims_rope=[2 * rotary, 2 * rotary, 4 * rotary],
                guidance_embeds=True,
            ),
            vae=df.AutoencoderKL(
                block_out_channels=(width // 4, width // 2),
                layers_per_block=1,
                latent_channels=1,
                norm_num_groups=4,
                down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2,
                sample_size=32,
                use_quant_conv=False,
                use_post_quant_conv=False,
                shift_factor=0.06,
                scaling_factor=1.5,
            ),
        )
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False).to(scale.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load(self, folder: Path) -> Any:
        """See :class:`Work`."""
        import diffusers

        pipe = diffusers.FluxPipeline.from_pretrained(folder, **self.options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def items(self, units: int) -> list[Item]:
        """See :class:`Work`."""
        dice, scale = random.Random(1), self._scale
        return [
            Item(
                seed,
                (_prompt(dice, scale, dice.randint(2, scale.prompt_tokens)),),
                (scale.pixels * dice.randint(2, 4), scale.pixels * dice.randint(2, 4)),
            )
            for seed in range(units)
        ]

    def run(self, model: Any, item: Item, device: torch.device) -> torch.Tensor:
        """See :class:`Work`."""
        with torch.no_grad():
            tokens = torch.tensor(item.prompts, device=device)
            pooled, embeds = model.text_encoder(tokens).pooler_output, model.text_encoder_2(tokens)[0]
            images = model(
                prompt_embeds=embeds,
                pooled_prompt_embeds=pooled,
                height=item.size[0],
                width=item.size[1],
                num_inference_steps=2,
                generator=torch.Generator("cpu").manual_seed(item.seed),
                output_type="pt",
            ).images
            return images.cpu()

    def units(self, item: Item) -> int:
        """See :class:`Work`."""
        return 1

    def extents(self, item: Item) -> tuple[int, ...]:
        """See :class:`Work`."""
        return (item.size[0] * item.size[1] * 1000 + len(item.prompts[0]),)


class Answers:
    """Sampled answers of a Llama to some prompts at once; a unit is a token."""

    name, unit = "tokens", "tokens"

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self.options: dict[str, Any] = {"dtype": scale.dtype}
        self.workload = Workload(prompt_tokens=scale.prompt_tokens, new_tokens=scale.new_tokens, batch=scale.answers)

    def make(self) -> Any:
        """See :class:`Work`."""
        import transformers as tf

        scale = self._scale
        width = scale.heads * scale.head_dim
        torch.manual_seed(6)
        config = tf.LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=scale.layers,
            num_attention_heads=scale.heads,
            num_key_value_heads=scale.heads // 2,
            vocab_size=scale.vocabulary,
            max_position_embeddings=4 * (scale.prompt_tokens + scale.new_tokens),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        return tf.LlamaForCausalLM(config).eval().requires_grad_(False).to(scale.dtype)

    def load(self, folder: Path) -> Any:
        """See :class:`Work`."""
        import transformers

        return transformers.LlamaForCausalLM.from_pretrained(folder, **self.options).eval().requires_grad_(False)

    def items(self, units: int) -> list[Item]:
        """See :class:`Work`."""
        dice, scale = random.Random(2), self._scale
        made: list[Item] = []
        left = units
        while left:
            count = min(left, dice.randint(max(1, scale.new_tokens // 4), scale.new_tokens))
            rows, length = min(left // count, dice.randint(1, scale.answers)), dice.randint(2, scale.prompt_tokens)
            made.append(Item(len(made), tuple(_prompt(dice, scale, length) for _ in range(rows)), (count,)))
            left -= rows * count
        return made

    def run(self, model: Any, item: Item, device: torch.device) -> torch.Tensor:
        """See :class:`Work`."""
        torch.manual_seed(item.seed)
        with torch.no_grad():
            tokens = torch.tensor(item.prompts, device=device)
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=item.size[0],
                min_new_tokens=item.size[0],
                do_sample=True,
                temperature=1.0,
                top_k=50,
            )
            return found.cpu()

    def units(self, item: Item) -> int:
        """See :class:`Work`."""
        return len(item.prompts) * item.size[0]

    def extents(self, item: Item) -> tuple[int, ...]:
        """See :class:`Work`."""
        return len(item.prompts) * len(item.prompts[0]), len(item.prompts) * (item.size[0] + len(item.prompts[0]))


def _prompt(dice: random.Random, scale: Scale, length: int) -> tuple[int, ...]:
    return tuple(dice.randrange(3, scale.vocabulary) for _ in range(length))
