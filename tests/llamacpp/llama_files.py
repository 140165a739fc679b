"""Tiny GGUF models that llama.cpp loads: names, shapes and keys of seven architectures, weights of zero."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

_spec = importlib.util.spec_from_file_location("gguf_files", Path(__file__).parents[1] / "inspect" / "gguf_files.py")
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)

WIDTH, FEEDFORWARD, VOCABULARY = 256, 512, 320


def write(path, metadata, tensors):
    """A whole file; its weights are a hole, so that large models are written in no time."""
    keys, infos, data = files.header_parts(metadata, tensors)
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    raw += bytes(-len(raw) % 32)
    with path.open("wb") as stream:
        stream.write(raw)
        stream.truncate(len(raw) + data)
    return path


def base(architecture, layers, **keys):
    """Metadata and the tensors outside the layers; ``keys`` with "__" for "."."""
    metadata = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "none",
        f"{architecture}.vocab_size": VOCABULARY,
        f"{architecture}.block_count": layers,
        f"{architecture}.embedding_length": WIDTH,
        f"{architecture}.context_length": 32768,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
    }
    metadata |= {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return metadata, [("token_embd.weight", "F16", (VOCABULARY, WIDTH)), ("output_norm.weight", "F32", (WIDTH,))]


def output():
    return [("output.weight", "F16", (VOCABULARY, WIDTH))]


def heads(count, kv_count, size=64):
    return {
        "attention__head_count": count,
        "attention__head_count_kv": kv_count,
        "attention__key_length": size,
        "attention__value_length": size,
    }


def attention(i, count, kv_count, size=64):
    rows = {"q": count * size, "k": kv_count * size, "v": kv_count * size}
    made = [(f"blk.{i}.attn_{name}.weight", "F16", (row, WIDTH)) for name, row in rows.items()]
    norms = [(f"blk.{i}.attn_norm.weight", "F32", (WIDTH,))]
    return norms + made + [(f"blk.{i}.attn_output.weight", "F16", (WIDTH, count * size))]


def head_norms(i, size=64):
    return [(f"blk.{i}.attn_{name}_norm.weight", "F32", (size,)) for name in ("q", "k")]


def feedforward(i, inner=FEEDFORWARD):
    shapes = {"gate": (inner, WIDTH), "up": (inner, WIDTH), "down": (WIDTH, inner)}
    norm = [(f"blk.{i}.ffn_norm.weight", "F32", (WIDTH,))]
    return norm + [(f"blk.{i}.ffn_{name}.weight", "F16", shape) for name, shape in shapes.items()]


def experts(i, count=8, inner=128, type_name="F16"):
    shapes = {"gate": (count, inner, WIDTH), "up": (count, inner, WIDTH), "down": (count, WIDTH, inner)}
    router = [(f"blk.{i}.ffn_gate_inp.weight", "F32", (count, WIDTH))]
    return router + [(f"blk.{i}.ffn_{name}_exps.weight", type_name, shape) for name, shape in shapes.items()]


def gemma3():
    metadata, tensors = base("gemma3", 8, feed_forward_length=FEEDFORWARD, attention__sliding_window=1024, **heads(4, 2))
    for i in range(8):
        tensors += attention(i, 4, 2) + head_norms(i) + feedforward(i)
        tensors += [(f"blk.{i}.post_{name}.weight", "F32", (WIDTH,)) for name in ("attention_norm", "ffw_norm")]
    return metadata, tensors


def gpt_oss():
    more = {"expert_feed_forward_length": 128, "feed_forward_length": 128, "expert_count": 8, "expert_used_count": 2}
    metadata, tensors = base("gpt-oss", 6, attention__sliding_window=128, **heads(4, 2), **more)
    tensors += output()
    for i in range(6):
        tensors += attention(i, 4, 2) + experts(i)
        tensors += [(f"blk.{i}.post_attention_norm.weight", "F32", (WIDTH,)), (f"blk.{i}.attn_sinks.weight", "F32", (4,))]
        tensors += [(f"blk.{i}.attn_{name}.bias", "F32", (n,)) for name, n in (("q", 256), ("k", 128), ("v", 128), ("output", 256))]
        tensors += [(f"blk.{i}.ffn_{name}_exps.bias", "F32", (8, n)) for name, n in (("gate", 128), ("up", 128), ("down", 256))]
        tensors += [(f"blk.{i}.ffn_gate_inp.bias", "F32", (8,))]
    return metadata, tensors


def deepseek2():
    latent = {"kv_lora_rank": 512, "q_lora_rank": 64, "key_length_mla": 192, "value_length_mla": 128}
    sizes = {"head_count": 4, "head_count_kv": 1, "key_length": 576, "value_length": 512}
    keys = {f"attention__{key}": value for key, value in (latent | sizes).items()}
    keys |= {"feed_forward_length": FEEDFORWARD, "expert_feed_forward_length": 128, "rope__dimension_count": 64, "expert_count": 8}
    keys |= {"expert_used_count": 2, "expert_shared_count": 1, "expert_weights_scale": 1.0, "expert_gating_func": 1}
    metadata, tensors = base("deepseek2", 4, leading_dense_block_count=1, **keys)
    tensors += output()
    for i in range(4):
        shapes = {"q_a": (64, WIDTH), "q_b": (4 * 192, 64), "kv_a_mqa": (576, WIDTH), "k_b": (4, 512, 128), "v_b": (4, 128, 512)}
        tensors += [(f"blk.{i}.attn_{name}.weight", "F16", shape) for name, shape in shapes.items()]
        tensors += [(f"blk.{i}.attn_{name}.weight", "F32", (n,)) for name, n in (("norm", WIDTH), ("q_a_norm", 64), ("kv_a_norm", 512))]
        tensors += [(f"blk.{i}.attn_output.weight", "F16", (WIDTH, 4 * 128))]
        if i < 1:
            tensors += feedforward(i)
            continue
        tensors += [(f"blk.{i}.ffn_norm.weight", "F32", (WIDTH,)), *experts(i)]
        shared = {"gate": (128, WIDTH), "up": (128, WIDTH), "down": (WIDTH, 128)}
        tensors += [(f"blk.{i}.ffn_{name}_shexp.weight", "F16", shape) for name, shape in shared.items()]
    return metadata, tensors


def mamba():
    metadata, tensors = base("mamba", 4, ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=16, ssm__time_step_rank=16)
    for i in range(4):
        products = {"in": (1024, WIDTH), "x": (48, 512), "dt": (512, 16), "out": (WIDTH, 512)}
        tensors += [(f"blk.{i}.ssm_{name}.weight", "F16", shape) for name, shape in products.items()]
        tensors += [(f"blk.{i}.attn_norm.weight", "F32", (WIDTH,)), (f"blk.{i}.ssm_conv1d.weight", "F32", (512, 4))]
        tensors += [(f"blk.{i}.ssm_{name}.bias", "F32", (512,)) for name in ("conv1d", "dt")]
        tensors += [(f"blk.{i}.ssm_a", "F32", (512, 16)), (f"blk.{i}.ssm_d", "F32", (512,))]
    return metadata, tensors


def qwen3moe(layers=5, count=8, inner=128, type_name="F16"):
    more = {"expert_feed_forward_length": inner, "feed_forward_length": FEEDFORWARD, "expert_count": count, "expert_used_count": 2}
    metadata, tensors = base("qwen3moe", layers, **heads(8, 2), **more)
    tensors += output()
    for i in range(layers):
        tensors += attention(i, 8, 2) + head_norms(i) + experts(i, count, inner, type_name)
        tensors += [(f"blk.{i}.ffn_norm.weight", "F32", (WIDTH,))]
    return metadata, tensors


def lfm2():
    metadata, tensors = base(
        "lfm2", 4, feed_forward_length=FEEDFORWARD, attention__head_count=4, attention__head_count_kv=[0, 2, 0, 2], shortconv__l_cache=3
    )
    tensors = [tensors[0], ("token_embd_norm.weight", "F32", (WIDTH,))]
    for i in range(4):
        tensors += feedforward(i)
        if i % 2:
            tensors += attention(i, 4, 2) + head_norms(i)
            continue
        tensors += [(f"blk.{i}.attn_norm.weight", "F32", (WIDTH,)), (f"blk.{i}.shortconv.conv.weight", "F32", (WIDTH, 3))]
        tensors += [(f"blk.{i}.shortconv.{name}_proj.weight", "F16", (n, WIDTH)) for name, n in (("in", 768), ("out", 256))]
    return metadata, tensors


def llama(layers=6):
    metadata, tensors = base("llama", layers, feed_forward_length=FEEDFORWARD, **heads(4, 2))
    tensors += output()
    for i in range(layers):
        tensors += attention(i, 4, 2) + feedforward(i)
    return metadata, tensors
