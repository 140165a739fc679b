"""A real GPU as plans see it: drivers and torch agree, and what is measured is what the hardware can do."""

from __future__ import annotations

import pytest

from overflowml_core import session
from overflowml_core.inspect.accelerators import find_accelerators
from overflowml_core.inspect.devices import find_devices
from overflowml_core.inspect.machine import detect_machine

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def test_driver_and_torch_name_the_same_cards():
    drivers, seen = find_devices(), find_accelerators()
    assert seen
    by_name = {device.name: device for device in drivers}
    for accelerator in seen:
        assert abs(by_name[accelerator.name].total_bytes - accelerator.total_bytes) < 0.05 * accelerator.total_bytes
        assert by_name[accelerator.name].capability == "{}.{}".format(*torch.cuda.get_device_capability(accelerator.index))


def test_measured_rates_are_of_the_order_of_the_datasheet(tmp_path):
    from overflowml_core.runtime.calibrate import calibrate

    machine = detect_machine(find_accelerators(), tmp_path)
    known = machine.rates_of(0)
    if known.source != "datasheet":
        pytest.skip(f"{machine.compute.name} is in no datasheet that the project has")
    measured = calibrate(machine, tmp_path, quick=True).rates_of(0)
    assert measured.source == "measured"
    for found, expected in (
        (measured.h2d_bytes_per_s, known.h2d_bytes_per_s),
        (measured.memory_bytes_per_s, known.memory_bytes_per_s),
        (measured.flop_per_s("matmul", "BF16"), known.flop_per_s("matmul", "BF16")),
    ):
        assert 0.3 < found / expected < 3


def test_predicted_peak_of_a_direct_plan_is_the_allocators(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path))
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4, vocab_size=32000
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    import overflowml

    workload = overflowml.Workload(prompt_tokens=512, new_tokens=2)
    predicted = session.make_plan(session.describe(model, workload), overflowml.Limits(quality="lossless"), workload)
    model.to("cuda")
    tokens = torch.ones(1, 512, dtype=torch.long, device="cuda")
    with torch.no_grad():
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    measured = torch.cuda.max_memory_allocated()
    assert abs(predicted.estimate.device_peak_bytes / measured - 1) < 0.05
