"""A trace: what has values and what has none, what counts as alive, whose work it was, and that nothing is left behind."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from overflowml_core.errors import OverflowmlError
from overflowml_core.runtime.fake import REAL_ELEMENTS, NoValues, TooLong, Tracer, is_fake, tracing
from tests.runtime import models
from tests.runtime.conftest import Virtual

LARGE = REAL_ELEMENTS + 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two blocks; the first one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers[1](self.layers[0](self.layers[0](x))))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def watched(tracer: Tracer, module: nn.Module | None = None, methods: tuple[str, ...] = ()) -> Any:
    with torch.device("meta"):
        made = Net()
    chosen = made if module is None else module
    tracer.watch("net", chosen, methods)
    return chosen


# ---- values


def test_small_tensors_made_from_nothing_have_values() -> None:
    with tracing() as tracer:
        steps = torch.linspace(1, 0, 11)
        assert (steps * 10).round().int().tolist() == list(range(10, -1, -1))
        assert torch.nonzero(steps < 0.45).flatten().tolist() == [6, 7, 8, 9, 10]
        assert not is_fake(steps)
        assert tracer.guesses == 0


def test_large_tensors_have_none() -> None:
    with tracing():
        assert is_fake(torch.zeros(LARGE))
        assert not is_fake(torch.zeros(REAL_ELEMENTS))
        positions = torch.arange(1024)
        assert is_fake(positions[:, None] >= positions[None, :]), "a mask of all pairs is large though its positions are small"


def test_what_meets_a_weight_has_none() -> None:
    with tracing() as tracer:
        assert is_fake(watched(tracer)(torch.ones(1, 4, 64)))


def test_reading_a_value_that_is_not_there_is_counted_and_gives_zero() -> None:
    with tracing() as tracer:
        x = torch.ones(LARGE)
        assert x.sum().item() == 0.0
        assert not bool((x > 0).any())
        assert int(x.argmax()) == 0
        assert not torch.equal(x, x + 1)
        assert tracer.guesses == 4


def test_a_real_tensor_that_unknown_values_were_written_into_is_unknown() -> None:
    with tracing() as tracer:
        small = torch.ones(4)
        small[1:2].copy_(torch.ones(LARGE).sum().reshape(1))
        assert small.sum().item() == 0.0
        assert tracer.guesses == 1


def test_shapes_that_depend_on_missing_values_are_refused() -> None:
    with tracing(), pytest.raises(NoValues, match="nonzero"):
        torch.nonzero(torch.ones(LARGE))


def test_equal_shapes_do_not_make_equal_operations() -> None:
    with tracing() as tracer:
        whole, wide = torch.zeros(LARGE, dtype=torch.int64), torch.zeros(512, 256)
        for _ in range(2):
            assert (whole * 1).dtype == torch.int64
            assert (whole * 1.0).dtype == torch.float32
            assert (whole * True).dtype == torch.int64
            assert torch.zeros_like(wide.t()).stride() == (1, 256)
            assert torch.zeros_like(wide).stride() == (256, 1)
            assert wide.sum(0).shape == (256,)
            assert wide.sum(1).shape == (512,)
            values, places = wide.topk(3)
            assert (values.dtype, places.dtype) == (torch.float32, torch.int64)
            assert values.untyped_storage()._cdata != places.untyped_storage()._cdata
        del values, places
        assert tracer.live_bytes() == whole.nbytes + 504 + wide.nbytes


# ---- memory


def test_storages_count_once_rounded_up_until_they_are_freed() -> None:
    with tracing() as tracer:
        x = torch.zeros(LARGE, dtype=torch.uint8)
        assert tracer.live_bytes() == REAL_ELEMENTS + 512
        view = x[1:].view(-1)
        assert tracer.live_bytes() == REAL_ELEMENTS + 512, "views own nothing"
        del x
        assert tracer.live_bytes() == REAL_ELEMENTS + 512, "a view keeps its storage"
        del view
        assert tracer.live_bytes() == 0
        assert tracer.peak_bytes == REAL_ELEMENTS + 512


def test_weights_and_buffers_are_no_activations() -> None:
    with tracing() as tracer:
        module = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512))
        assert tracer.live_bytes() > 512 * 512 * 4
        tracer.watch("net", module)
        assert tracer.live_bytes() == 0


def test_peak_of_a_block_is_what_it_adds() -> None:
    # 100 rows of 64 floats come in; the block holds two maps of 256 while relu runs, beside its input, which was there before.
    with tracing() as tracer:
        watched(tracer)(torch.ones(100, 64))
    (call,) = tracer.calls
    assert [block.activation_bytes for block in call.blocks] == [2 * 100 * 256 * 4] * 2
    assert call.entry_bytes == 100 * 64 * 4
    # The second block runs while nobody holds the first input any more but its caller, and the output of the first is there.
    assert call.activation_bytes == 2 * 100 * 64 * 4 + 2 * 100 * 256 * 4


def test_attention_takes_no_matrix_of_all_pairs() -> None:
    with tracing() as tracer:
        q = torch.empty(1, 4, 4096, 64)
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert tracer.live_bytes() == 2 * 4 * 4096 * 64 * 4
        merged = out.transpose(1, 2).reshape(1, 4096, 256)
        assert merged.untyped_storage()._cdata == out.untyped_storage()._cdata, "as behind flash kernels, heads merge without a copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "t5", "moe"])
def test_peak_and_operations_are_those_of_the_virtual_accelerator(name: str, dtype: torch.dtype, vgpu: Virtual) -> None:
    make, options = _language_models()[name], {} if name == "t5" else {"use_cache": True, "logits_to_keep": 1}
    with tracing() as tracer:
        with torch.device("meta"):
            model = make().eval().to(dtype)
        tracer.watch("model", model)
        model(torch.ones(2, 96, dtype=torch.long), **options)
    (call,) = tracer.calls
    model = make().eval().to(dtype).to("vgpu")
    gc.collect()
    vgpu.reset(flop_per_s=1.0, memory_bytes_per_s=1e30)
    before = vgpu.sim.allocated_bytes
    with torch.no_grad():
        model(torch.ones(2, 96, dtype=torch.long, device="vgpu"), **options)
    assert call.activation_bytes == vgpu.sim.peak_bytes - before
    assert call.flop == round(vgpu.sim.busy("compute"))


def _language_models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 512}
    llama = transformers.LlamaConfig(**sizes, intermediate_size=384)
    moe = transformers.Qwen3MoeConfig(
        **sizes, intermediate_size=256, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, head_dim=16
    )
    t5 = transformers.T5Config(d_model=128, d_kv=16, d_ff=256, num_layers=3, num_heads=8, vocab_size=512, feed_forward_proj="gated-gelu")
    return {
        "llama": lambda: transformers.LlamaForCausalLM(llama),
        "moe": lambda: transformers.Qwen3MoeForCausalLM(moe),
        "t5": lambda: transformers.T5EncoderModel(t5),
    }


# ---- calls


def test_work_belongs_to_the_block_that_did_it() -> None:
    with tracing() as tracer:
        watched(tracer)(torch.ones(100, 64))
    (call,) = tracer.calls
    once = 2 * 2 * 100 * 64 * 256
    assert [block.flop for block in call.blocks] == [2 * once, once]
    assert [block.calls for block in call.blocks] == [2, 1]
    assert sum(work.flop for work in call.outside) == 2 * 100 * 64 * 8
    assert call.flop == 3 * once + 2 * 100 * 64 * 8


def test_a_call_inside_a_call_is_part_of_it() -> None:
    with tracing() as tracer:
        net = watched(tracer, methods=("decode",))
        net.decode(torch.ones(100, 64))
        net(torch.ones(100, 64))
        with tracer.calling("net", "head", torch.ones(1)):
            net.head(torch.ones(100, 64))
    assert [call.method for call in tracer.calls] == ["decode", "forward", "head"]
    assert tracer.calls[0].blocks == tracer.calls[1].blocks
    assert [block.calls for block in tracer.calls[2].blocks] == [0, 0]
    assert [call.label for call in tracer.calls] == ["100x64 F32", "100x64 F32", "1 F32"]


def test_equal_runs_give_equal_calls() -> None:
    def run() -> object:
        with tracing() as tracer:
            watched(tracer)(torch.ones(100, 64))
        return tracer.calls

    assert run() == run()


def test_shared_weights_stay_shared() -> None:
    with tracing() as tracer:
        model = watched(tracer, models.llama(tied=True))
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_block_that_never_ends_is_given_up() -> None:
    class Loop(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(100):
                x = self.layers[1](x)
            return x

    with torch.device("meta"):
        module = Loop()
    with tracing(block_operations=10) as tracer:
        watched(tracer, module)(torch.ones(1, 64))  # many calls of few operations
    assert tracer.calls[0].blocks[1].calls == 100
    with tracing(block_operations=3) as tracer, pytest.raises(TooLong):
        watched(tracer)(torch.ones(1, 64))


# ---- nothing is left behind


def test_nothing_is_left_after_an_exception() -> None:
    with torch.device("meta"):
        net = Net()
    names = set(vars(net))

    def fail() -> None:
        with tracing() as tracer:
            tracer.watch("net", net, ("decode",))
            net.decode(torch.ones(1, 63))

    with pytest.raises(RuntimeError, match=r"same reduction dim|cannot be multiplied"):
        fail()
    assert set(vars(net)) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not _get_current_dispatch_mode_stack()
    assert torch.is_grad_enabled()
    assert not logging.getLogger("torch._subclasses.fake_tensor").filters
    assert torch.ones(2).sum().item() == 2.0
    with tracing() as tracer:
        watched(tracer)(torch.ones(1, 64))
    assert len(tracer.calls) == 1


def test_a_trace_goes_on_after_a_failed_call() -> None:
    with tracing() as tracer:
        net = watched(tracer)
        with pytest.raises(RuntimeError):
            net(torch.ones(1, 63))
        net(torch.ones(100, 64))
    assert [block.calls for block in tracer.calls[-1].blocks] == [2, 1]
    assert tracer.calls[-1].blocks[0].activation_bytes == 2 * 100 * 256 * 4


def test_random_state_is_given_back() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with tracing():
        torch.rand(5)
        torch.manual_seed(1)
    assert torch.equal(torch.rand(3), expected)


def test_a_trace_inside_a_trace_is_refused() -> None:
    with tracing(), pytest.raises(OverflowmlError, match="under way"), tracing():
        pass
    with tracing() as tracer:
        assert tracer.live_bytes() == 0


def test_threads_trace_side_by_side() -> None:
    flops: list[int] = []

    def run() -> None:
        with tracing() as tracer:
            watched(tracer)(torch.ones(100, 64))
        flops.append(tracer.calls[0].flop)

    threads = [threading.Thread(target=run) for _ in range(3)]
    with tracing():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(flops) == 3
    assert len(set(flops)) == 1
