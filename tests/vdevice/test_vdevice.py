"""The virtual accelerator's own promises: what engine tests may rely on."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable

import pytest
import torch

from tests.vdevice import Config, Faults, HazardError, SimDevice, install, register_pinned, unregister_pinned

MIB = 1 << 20


def fresh(**settings: object) -> SimDevice:
    gc.collect()
    return install(Config(**settings))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _clean_start() -> None:
    """No test sees another's settings, faults or hazards. Tensors may outlive a test: compare sizes to a base."""
    fresh()


# ---- memory


def test_budget_is_exact_and_freed_with_the_last_view() -> None:
    device = fresh(budget_bytes=MIB, align_bytes=1)
    base = device.allocated_bytes
    whole = torch.empty(MIB - base, dtype=torch.uint8, device="vgpu")
    with pytest.raises(torch.OutOfMemoryError, match=f"allocate 1 bytes; {MIB} are allocated of {MIB}, 0 are free"):
        torch.empty(1, dtype=torch.uint8, device="vgpu")
    view = whole[8:16].view(torch.float32)
    del whole
    assert device.allocated_bytes == MIB
    del view
    assert device.allocated_bytes == base
    assert device.peak_bytes == MIB


CUDA_NAMES = """
    Event OutOfMemoryError Stream current_device current_stream default_stream device device_count empty_cache
    get_device_name get_device_properties get_rng_state is_available manual_seed max_memory_allocated max_memory_reserved
    mem_get_info memory_allocated memory_reserved reset_peak_memory_stats set_device set_rng_state set_stream stream
    synchronize
"""


def test_module_offers_the_names_of_torch_cuda() -> None:
    fresh()
    module = torch.get_device_module("vgpu")
    assert [name for name in CUDA_NAMES.split() if not (hasattr(module, name) and hasattr(torch.cuda, name))] == []
    assert module.is_available()
    assert (module.device_count(), module.current_device()) == (1, 0)
    with module.device("vgpu:0"), torch.random.fork_rng(devices=[0], device_type="vgpu"):
        module.manual_seed(7)
        first = torch.rand(3, device="vgpu")
        module.manual_seed(7)
        assert torch.equal(torch.rand(3, device="vgpu"), first)
    with pytest.raises(ValueError, match="expected vgpu:0"):
        module.Stream(device="cpu")


def test_memory_functions_agree_with_the_ledger() -> None:
    device = fresh(budget_bytes=MIB)
    base = torch.vgpu.memory_allocated()
    x = torch.zeros(1000, device="vgpu")  # 4000 bytes, rounded up to 4096
    assert torch.vgpu.memory_allocated() - base == 4096
    assert torch.vgpu.mem_get_info() == (MIB - base - 4096, MIB)
    assert torch.accelerator.memory_allocated() == device.allocated_bytes
    del x
    assert torch.vgpu.max_memory_allocated() - base == 4096
    torch.vgpu.reset_peak_memory_stats()
    assert torch.vgpu.max_memory_allocated() == torch.vgpu.memory_reserved() == base
    assert torch.vgpu.get_device_properties(0).total_memory == MIB


def test_intermediate_results_are_charged() -> None:
    device = fresh(align_bytes=1)
    x = torch.ones(256, device="vgpu")
    base = device.allocated_bytes
    y = (x + 1) * 2
    assert device.allocated_bytes - base == 1024
    assert device.peak_bytes - base == 2048
    assert y.sum().item() == 1024


def test_flat_buffer_swapped_under_a_modules_parameters() -> None:
    device = fresh()
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(4, 64)
    expected = linear(x)
    buffer = torch.empty(1 << 16, dtype=torch.uint8, device="vgpu")
    allocations, at, home = device.allocation_count, 256, {}
    for name, parameter in linear.named_parameters():
        home[name] = parameter.data
        slot = buffer[at : at + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        slot.copy_(parameter.data)
        parameter.data = slot
        at += parameter.nbytes
        assert parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert device.allocation_count == allocations
    assert torch.allclose(linear(x.to("vgpu")).cpu(), expected, atol=1e-6)
    buffer.zero_()
    assert linear(x.to("vgpu")).abs().sum().item() == 0
    for name, parameter in linear.named_parameters():
        parameter.data = home[name]
    assert torch.equal(linear(x), expected)


def test_nothing_leaks_after_exceptions() -> None:
    device = fresh(budget_bytes=8 * MIB)
    base = device.allocated_bytes
    for _ in range(20):
        with pytest.raises(torch.OutOfMemoryError):
            [torch.empty(MIB, device="vgpu") for _ in range(100)]
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(100, device="vgpu") + torch.ones(100)
        with pytest.raises(RuntimeError, match="size"):
            torch.ones(100, device="vgpu") + torch.ones(3, device="vgpu")
    gc.collect()
    assert device.allocated_bytes == base


def test_out_of_memory_inside_a_model_leaves_it_usable() -> None:
    device = fresh(budget_bytes=256 << 10)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]).to("vgpu")
    base = device.allocated_bytes
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.zeros(4096, 64, device="vgpu"))
        gc.collect()
        assert device.allocated_bytes == base
        assert model(torch.zeros(16, 64, device="vgpu")).shape == (16, 64)
    assert device.allocated_bytes == base


def test_install_again_keeps_live_tensors_and_streams() -> None:
    device = fresh()
    x, stream = torch.arange(4.0, device="vgpu"), torch.vgpu.Stream()
    staged = torch.full((4,), 7.0, pin_memory=True)
    landing = torch.empty(4, device="vgpu")
    with stream:
        stream.wait_stream(torch.vgpu.default_stream())
        landing.copy_(staged, non_blocking=True)
    assert install(Config(h2d_bytes_per_s=1.0)) is device
    assert device.elapsed() == 0
    assert device.log == []
    with torch.vgpu.stream(stream):  # neither a late copy nor an old access is left over
        assert (x + landing).tolist() == [7, 8, 9, 10]
    assert device.hazards == []


def test_deepcopy_resize_out_and_inference_mode() -> None:
    fresh()
    x = torch.ones(4, device="vgpu")
    with torch.inference_mode():
        y = torch.empty(0, device="vgpu")
        assert torch.add(x, x, out=y).tolist() == [2, 2, 2, 2]
        assert y.is_inference()
    assert copy.deepcopy(torch.nn.Linear(2, 2).to("vgpu")).weight.device.type == "vgpu"
    assert x.clone().resize_(2, 2).tolist() == [[1, 1], [1, 1]]
    assert torch.view_as_complex(torch.ones(1, 2, device="vgpu")).conj().cpu().item() == 1 - 1j


# ---- devices do not mix


@pytest.mark.parametrize(
    "mix",
    [
        lambda g, c: g + c,
        lambda g, c: c + g,
        lambda g, c: torch.mm(g, c),
        lambda g, c: torch.cat([g, c]),
        lambda g, c: torch.nn.functional.linear(c, g),
        lambda g, c: torch.where(g > 0, g, c),
        lambda g, c: g.add_(c),
        lambda g, c: torch.nn.functional.layer_norm(g, (3,), c[0]),
        lambda g, c: torch.nn.functional.embedding(torch.zeros(2, dtype=torch.long), g),
        lambda g, c: torch.nn.functional.conv2d(g.view(1, 1, 3, 3), c.view(1, 1, 3, 3)),
        lambda g, c: torch.nn.functional.scaled_dot_product_attention(g[None, None], c[None, None], g[None, None]),
    ],
)
def test_host_and_device_tensors_do_not_mix(mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    fresh()
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, 3, device="vgpu"), torch.ones(3, 3))


def test_host_scalars_and_host_indices_are_allowed() -> None:
    fresh()
    x = torch.arange(3.0, device="vgpu")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]


# ---- time line

LAYERS, ROWS, WIDTH = 8, 128, 512
COPY_S, COMPUTE_S = WIDTH * WIDTH * 4 / 1e9, 0.5e-3


def stream_layers(slots: int, wait_copy: bool = True, wait_free: bool = True) -> tuple[float, torch.Tensor, SimDevice]:
    """Layers of 1 MiB at 1 GB/s through `slots` slots, 0.5 ms of compute each; returns seconds and result."""
    device = fresh(
        h2d_bytes_per_s=1e9,
        flop_per_s=2 * ROWS * WIDTH * WIDTH / COMPUTE_S,
        memory_bytes_per_s=1e18,
        budget_bytes=64 * MIB,
    )
    torch.manual_seed(0)
    host = [torch.randn(WIDTH, WIDTH).div_(WIDTH**0.5).pin_memory() for _ in range(LAYERS)]
    buffers = [torch.empty(WIDTH, WIDTH, device="vgpu") for _ in range(slots)]
    x = torch.randn(ROWS, WIDTH).to("vgpu")
    main, copies = torch.vgpu.current_stream(), torch.vgpu.Stream(device="vgpu")
    copied, free = [torch.vgpu.Event() for _ in host], [torch.vgpu.Event() for _ in host]
    torch.vgpu.synchronize()
    began = device.elapsed()

    def request(i: int) -> None:
        with torch.vgpu.stream(copies):
            if i >= slots and wait_free:
                copies.wait_event(free[i - slots])
            buffers[i % slots].copy_(host[i], non_blocking=True)
            copied[i].record(copies)

    for i in range(slots):
        request(i)
    for i in range(LAYERS):
        if wait_copy:
            main.wait_event(copied[i])
        x = x @ buffers[i % slots]
        free[i].record(main)
        if i + slots < LAYERS:
            request(i + slots)
    torch.vgpu.synchronize()
    return device.elapsed() - began, x, device


def test_one_slot_does_not_overlap() -> None:
    seconds, _, device = stream_layers(1)
    assert seconds == pytest.approx(LAYERS * (COPY_S + COMPUTE_S), abs=1e-12)
    assert device.hazards == []


def test_two_slots_hide_the_compute_behind_the_copies() -> None:
    seconds, x, device = stream_layers(2)
    assert seconds == pytest.approx(LAYERS * COPY_S + COMPUTE_S, abs=1e-12)
    assert device.busy("h2d") == pytest.approx(LAYERS * COPY_S + ROWS * WIDTH * 4 / 1e9, abs=1e-12)
    copies = [e for e in device.log if e.engine == "h2d"][1:]
    products = [e for e in device.log if e.op == "aten::mm"]
    assert len(copies) == len(products) == LAYERS
    assert copies[1].start_s < products[0].end_s  # the copy of the next layer runs while this one computes
    _, same, _ = stream_layers(1)
    assert torch.equal(x.cpu(), same.cpu())
    assert x.isfinite().all().item()


def test_missing_wait_for_the_copy_is_a_hazard() -> None:
    with pytest.raises(HazardError, match="RAW hazard: aten::mm"):
        stream_layers(2, wait_copy=False)


def test_missing_wait_for_the_slot_is_a_hazard() -> None:
    with pytest.raises(HazardError, match="WAR hazard: copy_h2d"):
        stream_layers(2, wait_free=False)


def test_use_on_another_stream_right_after_allocation_is_a_hazard() -> None:
    fresh()
    slot, host = torch.empty(4, device="vgpu"), torch.ones(4, pin_memory=True)
    with torch.vgpu.stream(torch.vgpu.Stream()), pytest.raises(HazardError, match=r"WAW hazard.*after allocation"):
        slot.copy_(host, non_blocking=True)


def test_free_while_another_stream_uses_the_bytes_is_a_hazard() -> None:
    device, other = fresh(hazards="record"), torch.vgpu.Stream()
    for name, shared in (("plain", False), ("recorded", True)):
        a = torch.ones(8, device="vgpu")
        other.wait_stream(torch.vgpu.current_stream())
        with torch.vgpu.stream(other):
            b = a * 2
        if shared:
            a.record_stream(other)
        device.hazards.clear()
        del a
        assert any("was freed while aten::mul" in h for h in device.hazards) is not shared, name
        del b


def test_free_hazard_is_raised_by_the_next_call() -> None:
    fresh()
    other, a = torch.vgpu.Stream(), torch.ones(8, device="vgpu")
    other.wait_stream(torch.vgpu.current_stream())
    with torch.vgpu.stream(other):
        b = a * 2
    del a
    with pytest.raises(HazardError, match="was freed while"):
        torch.vgpu.synchronize()
    torch.vgpu.synchronize()
    assert b.tolist() == [2] * 8


def test_elapsed_time_and_query_polling() -> None:
    fresh(h2d_bytes_per_s=1e6)
    begin, end = torch.vgpu.Event(enable_timing=True), torch.vgpu.Event(enable_timing=True)
    x, host = torch.empty(1000, dtype=torch.uint8, device="vgpu"), torch.ones(1000, dtype=torch.uint8, pin_memory=True)
    assert end.query()  # never recorded
    begin.record()
    x.copy_(host, non_blocking=True)
    end.record()
    polls = 0
    while not end.query():
        polls += 1
    assert 0 < polls <= 1001
    assert begin.elapsed_time(end) == pytest.approx(1.0)
    host.zero_()  # the host knows that the copy is done
    assert x.sum().item() == 1000


# ---- copies


def test_late_copy_poisons_its_destination_until_something_waits() -> None:
    fresh(hazards="off")
    host, x = torch.ones(16, pin_memory=True), torch.empty(16, device="vgpu")
    stream, copied = torch.vgpu.Stream(), torch.vgpu.Event()
    with torch.vgpu.stream(stream):
        x.copy_(host, non_blocking=True)
        copied.record(stream)
    assert x.isnan().all().item()
    torch.vgpu.current_stream().wait_event(copied)
    assert x.sum().item() == 16


def test_event_lands_only_the_copies_before_it() -> None:
    fresh(hazards="off")
    first, second = torch.empty(4, device="vgpu"), torch.empty(4, device="vgpu")
    host, copied = torch.ones(4, pin_memory=True), torch.vgpu.Event()
    with torch.vgpu.stream(torch.vgpu.Stream()):
        first.copy_(host, non_blocking=True)
        copied.record()
        second.copy_(host, non_blocking=True)
    copied.synchronize()
    assert first.sum().item() == 4
    assert second.isnan().all().item()


def test_copy_on_the_same_stream_has_landed_for_the_next_operator() -> None:
    fresh()
    x, host = torch.empty(4, device="vgpu"), torch.ones(4, pin_memory=True)
    x.copy_(host, non_blocking=True)
    assert (x + x).sum().item() == 8


def test_late_copy_reads_its_source_late() -> None:
    device = fresh(hazards="record")
    host, x = torch.ones(16, pin_memory=True), torch.empty(16, device="vgpu")
    copied = torch.vgpu.Event()
    x.copy_(host, non_blocking=True)
    copied.record()
    host.fill_(5)  # a staging buffer reused too early
    copied.synchronize()
    assert x.sum().item() == 80
    assert any("the host overwrote 64 pinned bytes" in h for h in device.hazards)


def test_source_overwritten_after_a_stream_wait_is_a_hazard() -> None:
    fresh()
    host, x, copied = torch.ones(16, pin_memory=True), torch.empty(16, device="vgpu"), torch.vgpu.Event()
    torch.vgpu.synchronize()
    with torch.vgpu.stream(torch.vgpu.Stream()):
        x.copy_(host, non_blocking=True)
        copied.record()
    copied.wait()  # orders the device, tells the host nothing
    y = x + 1
    host.zero_()
    with pytest.raises(HazardError, match="before it knew"):
        torch.vgpu.synchronize()
    assert y.tolist() == [2] * 16


def test_pinned_copies_run_in_the_background_and_pageable_ones_block() -> None:
    device = fresh(h2d_bytes_per_s=1e9)
    x = torch.empty(MIB, dtype=torch.uint8, device="vgpu")
    pageable = torch.zeros(MIB, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    assert pinned.is_pinned()
    assert pinned[5:9].is_pinned()
    assert not pageable.is_pinned()

    def host_seconds(source: torch.Tensor) -> float:
        torch.vgpu.synchronize()
        before = device.clock.host_s
        x.copy_(source, non_blocking=True)
        return device.clock.host_s - before

    assert host_seconds(pageable) == pytest.approx(MIB / 1e9)
    assert host_seconds(pinned) == 0


def test_copy_to_the_host_in_the_background_is_late_too() -> None:
    fresh()
    x = torch.ones(4, device="vgpu")
    host = x.to("cpu", non_blocking=True)  # new pinned memory, as on CUDA
    assert host.is_pinned()
    assert host.isnan().all()
    torch.vgpu.synchronize()
    assert host.tolist() == [1] * 4


def test_late_copy_lands_outside_the_inference_mode_it_was_issued_in() -> None:
    fresh()
    with torch.inference_mode():
        x, staged = torch.ones(4, device="vgpu"), torch.full((4,), 2.0, pin_memory=True)
        host = x.to("cpu", non_blocking=True)
        y = torch.empty(4, device="vgpu")
        y.copy_(staged, non_blocking=True)
    torch.vgpu.synchronize()
    assert (host.tolist(), y.tolist()) == ([1] * 4, [2] * 4)


def test_buffer_reused_in_both_directions_keeps_stream_order() -> None:
    device = fresh()
    host, a, b = torch.ones(4, pin_memory=True), torch.empty(4, device="vgpu"), torch.full((4,), 3.0, device="vgpu")
    a.copy_(host, non_blocking=True)
    host.copy_(b, non_blocking=True)
    b.copy_(torch.full((4,), 9.0, pin_memory=True), non_blocking=True)
    torch.vgpu.synchronize()
    assert (a.tolist(), host.tolist(), b.tolist()) == ([1] * 4, [3] * 4, [9] * 4)
    assert device.hazards == []


def test_pinned_budget_and_registration() -> None:
    device = fresh(pinned_bytes=1 << 12)
    base = device.pinned_bytes
    plain = torch.zeros(1 << 11, dtype=torch.uint8)
    register_pinned(plain)
    assert plain[100:].is_pinned()
    assert device.pinned_bytes - base == 1 << 11
    with pytest.raises(RuntimeError, match="already pinned"):
        register_pinned(plain[:16])
    with pytest.raises(RuntimeError, match=r"Tried to pin \d+ bytes"):
        torch.empty(1 << 12, dtype=torch.uint8, pin_memory=True)
    unregister_pinned(plain)
    assert not plain.is_pinned()
    with pytest.raises(RuntimeError, match="not been registered"):
        unregister_pinned(plain)
    held = torch.empty(1 << 10, dtype=torch.uint8, pin_memory=True)[1:]
    assert device.pinned_bytes - base == 1 << 10
    del held
    assert device.pinned_bytes == base


# ---- faults


def test_faults_hit_the_calls_they_name_and_no_others() -> None:
    device = fresh()
    base, pinned = device.allocated_bytes, device.pinned_bytes
    device.faults = Faults(alloc={2}, copy={2, 3}, pin={1})
    x = torch.empty(4, device="vgpu")
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        torch.empty(4, device="vgpu")
    x.copy_(torch.zeros(4))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="injected"):
            x.copy_(torch.ones(4))
    with pytest.raises(RuntimeError, match="injected"):
        torch.empty(4, pin_memory=True)
    assert torch.empty(4, pin_memory=True).is_pinned()
    assert x.tolist() == [0] * 4
    device.faults = Faults(alloc={1})  # counted from here
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(4, device="vgpu")
    device.faults = Faults(alloc={2})
    with pytest.raises(torch.OutOfMemoryError):
        (x + 1) * 2  # results of operators are allocations
    device.faults = Faults()
    del x
    assert (device.allocated_bytes, device.pinned_bytes) == (base, pinned)


# ---- threads


def test_threads_allocate_and_free_without_losing_a_byte() -> None:
    device = fresh(budget_bytes=8 * MIB, hazards="off")
    base = device.allocated_bytes

    def work() -> None:
        for _ in range(150):
            a = torch.empty(100, device="vgpu")
            b = a * 2
            b[1:] + 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert device.allocated_bytes == base


def test_reader_thread_reuses_its_staging_buffer_safely() -> None:
    """A thread of its own fills one pinned buffer, copies, waits for the event, and fills it again."""
    device = fresh(h2d_bytes_per_s=1e6)
    slots = [torch.empty(1000, dtype=torch.uint8, device="vgpu") for _ in range(4)]
    torch.vgpu.synchronize()
    copied = [torch.vgpu.Event() for _ in slots]
    issued = [threading.Event() for _ in slots]

    def read() -> None:
        stream, staging = torch.vgpu.Stream(), torch.empty(1000, dtype=torch.uint8, pin_memory=True)
        assert torch.vgpu.current_stream() == torch.vgpu.default_stream()
        with torch.vgpu.stream(stream):
            for i, slot in enumerate(slots):
                device.advance(1e-3)  # the disk
                staging.fill_(i + 1)
                slot.copy_(staging, non_blocking=True)
                copied[i].record(stream)
                issued[i].set()
                copied[i].synchronize()

    thread = threading.Thread(target=read)
    thread.start()
    sums = []
    for i, slot in enumerate(slots):
        assert issued[i].wait(timeout=10)
        assert device.clock.host_s == 0  # the reader's waits do not delay this thread's launches
        torch.vgpu.current_stream().wait_event(copied[i])
        sums.append(slot.sum(dtype=torch.int64))
    thread.join()
    assert [s.item() for s in sums] == [1000, 2000, 3000, 4000]
    assert device.elapsed() == pytest.approx(8e-3, rel=1e-3)
    assert device.hazards == []


# ---- whole models


def test_tiny_llama_generates_the_same_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    device = fresh()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 128, (1, 7))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    with torch.inference_mode():
        expected_logits, expected = model(tokens).logits, model.generate(tokens, **options)
        model.to("vgpu")
        options["attention_mask"] = options["attention_mask"].to("vgpu")
        assert torch.allclose(model(tokens.to("vgpu")).logits.cpu(), expected_logits, atol=1e-5)
        assert torch.equal(model.generate(tokens.to("vgpu"), **options).cpu(), expected)
    assert device.busy("compute") > 0


def test_tiny_flux_pipeline_makes_the_same_image() -> None:
    diffusers = pytest.importorskip("diffusers")
    fresh()
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer.eval(),
        )
    pipeline.set_progress_bar_config(disable=True)
    prompt, pooled = torch.randn(1, 12, 32), torch.randn(1, 32)

    def image(where: str) -> torch.Tensor:
        pipeline.to(where)
        result: torch.Tensor = pipeline(
            prompt_embeds=prompt.to(where),
            pooled_prompt_embeds=pooled.to(where),
            height=32,
            width=32,
            num_inference_steps=3,
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="pt",
        ).images
        assert result.device.type == where
        return result.cpu()

    assert torch.allclose(image("vgpu"), image("cpu"), atol=1e-5)
