"""Runs in the host's interpreter, with its real classes and no server: a MODEL of Load & Quantize is one like those of core loaders."""

from __future__ import annotations

import sys
from pathlib import Path

path, base = Path(sys.argv[1]), sys.argv[2]
sys.argv = [sys.argv[0], "--cpu", "--base-directory", base]

import comfy.options  # noqa: E402 -- the host reads the command line when it is imported

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402

from overflowml_comfyui import loader, running_host  # noqa: E402

_FIELDS = {"budget": "", "reserve": "", "width": 128, "height": 128, "steps": 3}


def main() -> None:
    """Fail where it differs from what the host's own loader gives, or a patch spoils the weights."""
    running_host.join_plugins()
    model = loader.obtain("diffusion_models/tiny_flux.safetensors", "int8", "minimal", _FIELDS).model
    own = comfy.sd.load_diffusion_model(str(path))
    assert type(model) is type(own)
    load, arguments = model.cached_patcher_init[:2]
    assert (load, arguments) == own.cached_patcher_init[:2]
    again = load(*arguments)

    kinds = {name: type(weight) for name, weight in own.model.named_parameters()}
    for one in (model, again):
        assert {name: type(weight) for name, weight in one.model.named_parameters()} == kinds
        assert one.model_size() == own.model_size()
    assert sum(issubclass(kind, QuantizedTensor) for kind in kinds.values()) == 32

    name = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    before = dict(model.model.named_parameters())[name].dequantize().clone()
    patched = model.clone()
    patched.add_patches({name: ("diff", (torch.ones(before.shape),))}, 0.5)  # what a LoRA comes to
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    changed = dict(patched.model.named_parameters())[name]
    changed = changed.dequantize() if isinstance(changed, QuantizedTensor) else changed
    assert torch.allclose(changed, before + 0.5, atol=0.02), (changed - before).flatten()[:4]
    patched.detach()
    assert torch.equal(dict(model.model.named_parameters())[name].dequantize(), before)
    print("patched, copied and loaded again")  # noqa: T201 -- read by the test


main()
