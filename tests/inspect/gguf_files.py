"""Writes GGUF files for the tests, byte by byte, so that every count, type and offset can be made wrong."""

from __future__ import annotations

import struct

from overflowml_core.inspect.ggml_types import GGML_TYPES

NUMBER_OF = {kind.name: number for number, kind in GGML_TYPES.items()}
LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32, BOOL, TEXT, ARRAY, UINT16 = 4, 5, 6, 7, 8, 9, 2


def text(value, order="<"):
    """A text as the format stores it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(f"{order}Q", len(raw)) + raw


def value_bytes(kind, value, order="<"):
    """A value; an array is (type of its elements, list)."""
    if kind == TEXT:
        return text(value, order)
    if kind == ARRAY:
        inner, items = value
        return struct.pack(f"{order}IQ", inner, len(items)) + b"".join(value_bytes(inner, item, order) for item in items)
    return struct.pack(order + LETTERS[kind], value)


def guess_kind(value):
    """The type under which a Python value is stored where a test does not care."""
    if isinstance(value, bool):
        return BOOL, value
    if isinstance(value, int):
        return UINT32, value
    if isinstance(value, float):
        return FLOAT32, value
    if isinstance(value, str):
        return TEXT, value
    items = list(value)
    return ARRAY, (guess_kind(items[0])[0] if items else UINT32, items)


def tensor_bytes(type_name, shape):
    """Bytes of a tensor whose shape is given as torch has it."""
    kind = GGML_TYPES[NUMBER_OF[type_name]]
    count = 1
    for size in shape:
        count *= size
    return count // kind.block_count * kind.block_bytes


def header_parts(metadata, tensors, order="<", alignment=32):
    """Keys, tensor infos and bytes of data of a file.

    Args:
        metadata: key -> value, or (type, value) for a certain type.
        tensors: (name, type name, shape as torch has it).
        order: of bytes.
        alignment: of the data.
    """
    keys = []
    for key, value in metadata.items():
        kind, plain = value if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int) else guess_kind(value)
        keys.append(text(key, order) + struct.pack(f"{order}I", kind) + value_bytes(kind, plain, order))
    infos, offset = [], 0
    for name, type_name, shape in tensors:
        dims = struct.pack(f"{order}I{len(shape)}Q", len(shape), *reversed(shape))
        infos.append(text(name, order) + dims + struct.pack(f"{order}IQ", NUMBER_OF[type_name], offset))
        offset += -(-tensor_bytes(type_name, shape) // alignment) * alignment
    return keys, infos, offset


def gguf_file(metadata, tensors=(), version=3, big_endian=False, alignment=32):
    """A whole file; its weights are zero."""
    order = ">" if big_endian else "<"
    keys, infos, data = header_parts(metadata, tensors, order, alignment)
    raw = b"GGUF" + struct.pack(f"{order}IQQ", version, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return raw + bytes(-len(raw) % alignment) + bytes(data)


def llama(layers=2, width=64, heads=4, kv_heads=2, feedforward=128, vocabulary=96, type_name="F16", **more):
    """Metadata and tensors of a small llama; ``more`` are keys after the architecture."""
    key_width = width // heads * kv_heads
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.embedding_length": width,
        "llama.feed_forward_length": feedforward,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.context_length": 2048,
        **{f"llama.{key}": value for key, value in more.items()},
    }
    tensors = [("token_embd.weight", type_name, (vocabulary, width)), ("output_norm.weight", "F32", (width,))]
    tensors.append(("output.weight", type_name, (vocabulary, width)))
    for i in range(layers):
        tensors += [
            (f"blk.{i}.attn_norm.weight", "F32", (width,)),
            (f"blk.{i}.attn_q.weight", type_name, (width, width)),
            (f"blk.{i}.attn_k.weight", type_name, (key_width, width)),
            (f"blk.{i}.attn_v.weight", type_name, (key_width, width)),
            (f"blk.{i}.attn_output.weight", type_name, (width, width)),
            (f"blk.{i}.ffn_gate.weight", type_name, (feedforward, width)),
            (f"blk.{i}.ffn_up.weight", type_name, (feedforward, width)),
            (f"blk.{i}.ffn_down.weight", type_name, (width, feedforward)),
        ]
    return metadata, tensors
