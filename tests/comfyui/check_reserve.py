"""Runs in the host's interpreter, with its real classes and no server: the reserve around a load, and the plan of a loaded model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent))
path, sd3 = (Path(argument) for argument in sys.argv[1:3])
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402 -- the host reads the command line when it is imported

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from sd3_files import BUDGETS, asked  # noqa: E402
from sd3_files import machine as card  # noqa: E402

import overflowml  # noqa: E402
from overflowml_comfyui import running_host  # noqa: E402
from overflowml_comfyui.decision import decide_module  # noqa: E402
from overflowml_comfyui.request import Request, request_of  # noqa: E402


def fingerprints() -> None:
    """Say what the plans of a model that the host loaded are called."""
    module = running_host.module_of(comfy.sd.load_diffusion_model(str(sd3)), "MODEL")[1]
    for budget in BUDGETS:
        limits, workload = asked(budget)
        part = decide_module("model", module, Request(workload, limits.device_bytes, limits.reserve_bytes), card())
        print(f"fingerprint {budget} {part.fingerprint}")  # noqa: T201 -- read by the test


def main() -> None:
    """Fail where the reserve does not reach the host's own arithmetic, or stays."""
    running_host.join_plugins()
    model = comfy.sd.load_diffusion_model(str(path))
    patcher, module = running_host.module_of(model, "MODEL")
    request = request_of({"budget": "12MB", "width": 128, "height": 128, "steps": 3})
    machine = running_host.machine()
    part = decide_module("model", module, request, machine)
    script = overflowml.plan(module, request.limits, request.workload, machine)
    assert part.plan is not None
    assert part.plan.fingerprint == script.fingerprint
    assert part.plan.phases[0].activation_bytes > 0

    before = management.minimum_inference_memory()
    seen: list[int] = []
    real_load = management.load_models_gpu

    def load(*arguments: object, **named: object) -> object:
        seen.append(management.minimum_inference_memory())
        return real_load(*arguments, **named)

    management.load_models_gpu = load
    changed = model.clone()
    changed.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, running_host.WRAPPER_KEY, running_host.with_reserve(part.plan, True))
    options = {"transformer_options": {"wrappers": changed.wrappers}}
    comfy.sampler_helpers.prepare_sampling(changed, (1, 16, 16, 16), {"positive": []}, options)
    assert len(seen) == 1
    free_bytes = int(management.get_free_memory(patcher.load_device))
    assert seen[0] - before > free_bytes * 9 // 10, (seen, before, free_bytes)  # all but the 12 MB is kept free of weights
    assert management.minimum_inference_memory() == before

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("cancelled")

    management.load_models_gpu = fail
    try:
        comfy.sampler_helpers.prepare_sampling(changed, (1, 16, 16, 16), {"positive": []}, options)
    except RuntimeError:
        assert management.minimum_inference_memory() == before
        print("reserve raised, restored, restored after an error; plan is the bare module's")  # noqa: T201 -- read by the test


main()
fingerprints()
