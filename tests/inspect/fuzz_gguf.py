"""Throws malformed GGUF files at ``read_gguf_header`` and holds it against the reader of the gguf package; ``fuzz.py`` runs it.

The rule: either BadCheckpoint, or a header whose tensors that reader finds too, at the same places. What is accepted is made a network
as well: that gives one, or an error of the project. Never another exception, never more memory than the file is long.
"""

from __future__ import annotations

import importlib.util
import random
import struct
from pathlib import Path

import gguf

from overflowml_core.errors import BadCheckpoint, OverflowmlError
from overflowml_core.facts import Workload
from overflowml_core.inspect.ggml_types import GGML_TYPES
from overflowml_core.inspect.gguf import GgufHeader, read_gguf_header
from overflowml_core.inspect.gguf_network import network_of_gguf

_spec = importlib.util.spec_from_file_location("gguf_files", Path(__file__).with_name("gguf_files.py"))
assert _spec is not None
assert _spec.loader is not None
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)

ABSURD_NUMBERS = [
    *(0, 1, 2, 3, 4, 5, 8, 9, 13, 31, 32),
    *(2**power + delta for power in (8, 16, 31, 32, 40, 53, 60, 62, 63, 64) for delta in (-1, 0, 1)),
]
KEYS = [
    *("block_count", "embedding_length", "feed_forward_length", "expert_count", "expert_used_count", "expert_feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.kv_lora_rank"),
    *("attention.sliding_window", "attention.sliding_window_pattern", "attention.causal", "ssm.state_size", "ssm.inner_size"),
    *("ssm.conv_kernel", "wkv.head_size", "nextn_predict_layers", "rope.dimension_count", "context_length"),
]
TENSORS = [
    *("token_embd", "output", "output_norm", "blk.0.attn_q", "blk.0.attn_k", "blk.1.attn_qkv", "blk.1.ffn_up", "blk.7.ffn_down"),
    *("blk.0.ffn_gate_exps", "blk.0.ffn_up_exps", "blk.0.ffn_gate.0", "blk.0.ffn_gate.1", "blk.1.ssm_a", "blk.0.time_mix_w1", "v.blk.0.q"),
    *(
        "double_blocks.0.img_attn.qkv",
        "single_blocks.0.linear1",
        "single_blocks.1.linear1",
        "transformer_blocks.0.attn.to_q",
        "x.0.0.w",
        "x.1.0.w",
    ),
    *("input_blocks.0.0", "middle_block.0.conv", "decoder.conv_in", "decoder.conv_out", "joint_blocks.0.x", "noise_refiner.0.mlp"),
]


def _value(rng: random.Random, depth: int = 0) -> tuple[int, object]:
    kind = rng.choice((0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12))
    if kind == files.TEXT:
        return kind, rng.choice(("", "llama", "é", "x" * 300, b"\xff\xfe", "flux", "adapter"))
    if kind == files.ARRAY:
        if depth >= 3:
            return kind, (4, [])
        inner, _ = _value(rng, depth + 1)
        items = [_like(rng, inner, depth + 1) for _ in range(rng.randrange(4))]
        return kind, (inner, items)
    return kind, _like(rng, kind, depth)


def _like(rng: random.Random, kind: int, depth: int) -> object:
    if kind in (6, 12):
        return rng.choice((0.0, 1.0, float("nan"), float("inf"), -1.5))
    if kind in (files.TEXT, files.ARRAY):
        while True:
            found, value = _value(rng, depth)
            if found == kind:
                return value
    bits = 8 * struct.calcsize(files.LETTERS[kind])
    signed = files.LETTERS[kind].islower()
    number = rng.choice((0, 1, 2, 3, 8, 64, rng.getrandbits(bits))) % 2 ** (bits - signed)
    return number & 1 if kind == files.BOOL else number


def valid_file(rng: random.Random) -> bytes:
    """A well-formed file of either byte order: a small model, or any keys and tensors."""
    if rng.random() < 0.3:
        metadata, tensors = files.llama(layers=rng.randrange(1, 3), width=32, heads=2, kv_heads=1, feedforward=32, vocabulary=32)
        metadata |= {f"llama.{rng.choice(KEYS)}": _value(rng) for _ in range(rng.randrange(3))}
    else:
        metadata = {rng.choice(("a", "é", "split.count", "general.type", "k" * 200)) + str(i): _value(rng) for i in range(rng.randrange(4))}
        if rng.random() < 0.7:
            metadata["general.architecture"] = rng.choice(("llama", "flux", "clip", "gemma2", "x"))
        names = rng.sample(TENSORS, rng.randrange(6))
        tensors = [(f"{name}.weight", rng.choice(list(files.NUMBER_OF)), _shape(rng)) for name in names]
    alignment = rng.choice((32, 32, 1, 64, 8))
    if alignment != 32:
        metadata["general.alignment"] = alignment
    return bytes(files.gguf_file(metadata, tensors, rng.choice((2, 3)), rng.random() < 0.2, alignment))


def _shape(rng: random.Random) -> tuple[int, ...]:
    # Rows of 256 and no more than 4: the largest types stay below a few KiB.
    return (*(rng.choice((0, 1, 2, 4)) for _ in range(rng.randrange(3))), 256)


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One change, near the start more often than not: a bit, a number made absurd, a piece doubled, moved or cut."""
    reach = len(raw) if rng.random() < 0.5 else min(len(raw), 400)
    at = rng.randrange(reach + 1)
    to = min(len(raw), at + rng.choice((1, 4, 8, 40)))
    match rng.randrange(7):
        case 0:
            return raw[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in raw[at : at + 1]) + raw[at + 1 :]
        case 1:
            return raw[:at] + raw[to:]
        case 2:
            return raw[:at] + raw[at:to] * 2 + raw[to:]
        case 3:
            return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:]
        case _:
            size = rng.choice((4, 8, 8))
            number = rng.choice(ABSURD_NUMBERS) % 2 ** (8 * size)
            # counts, lengths and types are where a small number stands in as many bytes
            places = [i for i in range(0, reach - size, 1) if raw[i + 1 : i + size] == bytes(size - 1)] or [at]
            at = rng.choice(places)
            return raw[:at] + struct.pack("<I" if size == 4 else "<Q", number) + raw[at + size :]


def make_input(rng: random.Random) -> bytes:
    """A file: arbitrary bytes behind the magic, or a well-formed one with none to four changes."""
    if rng.random() < 0.05:
        return rng.choice((b"", b"GGUF", b"GGUF\x03\0\0\0")) + rng.randbytes(rng.randrange(200))
    raw = valid_file(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        raw = mutate(raw, rng)
    return raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.05 else raw


def check(path: Path, raw: bytes) -> str:
    """Write one input and read it.

    Returns:
        "accepted" or "refused".

    Raises:
        AssertionError: the rule is broken.
    """
    path.write_bytes(raw)
    refusal: OverflowmlError | None = None
    try:
        header = read_gguf_header(path)
    except BadCheckpoint as error:
        refusal = error
    if refusal is not None:
        _check_message(refusal, path)
        return "refused"
    assert header.size_bytes == len(raw)
    # Their reader fails on a scalar in bfloat16, which ggml allows, and does not know its newest types.
    if all(tensor.shape and tensor.type_name in gguf.GGMLQuantizationType.__members__ for tensor in header.tensors):
        _compare(header, path, raw)
    try:
        assert network_of_gguf(path, Workload(prompt_tokens=7)).weight_bytes == sum(tensor.nbytes for tensor in header.tensors)
    except OverflowmlError as error:
        refusal = error
    if refusal is not None:
        _check_message(refusal, path)
    return "accepted"


def _compare(header: GgufHeader, path: Path, raw: bytes) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(theirs) == {tensor.name for tensor in header.tensors}, f"other names: {raw!r}"
    for tensor in header.tensors:
        other = theirs[tensor.name]
        assert (tensor.offset_bytes, tensor.nbytes) == (int(other.data_offset), int(other.n_bytes)), f"other place {tensor}: {raw!r}"
        assert tensor.shape == tuple(int(size) for size in reversed(other.shape)), f"other shape {tensor}: {raw!r}"
        assert tensor.type_name == other.tensor_type.name == GGML_TYPES[int(other.tensor_type)].name
        assert tensor.offset_bytes + tensor.nbytes <= len(raw)


def _check_message(refusal: OverflowmlError, path: Path) -> None:
    assert "\n" not in str(refusal), f"more than one line: {refusal!r}"
    assert len(str(refusal)) < len(str(path)) + 600, f"endless message: {refusal!r}"
