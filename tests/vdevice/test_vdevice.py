"""What the virtual accelerator promises of memory, devices, faults and whole models."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable

import pytest
import torch

from tests.vdevice import Config, Faults, install

MIB = 1 << 20


# ---- memory


def test_budget_is_exact_and_freed_with_the_last_view() -> None:
    device = install(Config(budget_bytes=MIB, align_bytes=1))
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
    get_device_name get_device_properties get_rng_state is_available manual_seed max_memory_allocated
    max_memory_reserved
    mem_get_info memory_allocated memory_reserved reset_peak_memory_stats set_device set_rng_state set_stream stream
    synchronize
"""


def test_module_offers_the_names_of_torch_cuda() -> None:
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
    device = install(Config(budget_bytes=MIB))
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
    device = install(Config(align_bytes=1))
    x = torch.ones(256, device="vgpu")
    base = device.allocated_bytes
    y = (x + 1) * 2
    assert device.allocated_bytes - base == 1024
    assert device.peak_bytes - base == 2048
    assert y.sum().item() == 1024


def test_flat_buffer_swapped_under_a_modules_parameters() -> None:
    device = install()
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
    device = install(Config(budget_bytes=8 * MIB))
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
    taken = install().allocated_bytes  # another test's tensors may still be alive
    device = install(Config(budget_bytes=taken + (256 << 10)))
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
    device = install()
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
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, 3, device="vgpu"), torch.ones(3, 3))


def test_host_scalars_and_host_indices_are_allowed() -> None:
    x = torch.arange(3.0, device="vgpu")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]


# ---- faults


def test_faults_hit_the_calls_they_name_and_no_others() -> None:
    device = install()
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


# ---- whole models


def test_tiny_llama_generates_the_same_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    device = install()
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
