"""Traps of the hosts' own calls (diffusers, transformers, accelerate): what goes wrong, and what keeps a managed model out of it."""

from __future__ import annotations

from overflowml_core.traps.trap import Trap

_PIPELINE = "plugins/overflowml_diffusers/attach.py, PIPELINE_MOVES"
_MODEL = "plugins/overflowml_diffusers/attach.py, MODEL_MOVES"
_PARTS = "overflowml_core/runtime/guards.py, guard_parts"
_BLOCKS = "overflowml_core/runtime/streamer.py: a block is on the device as a whole while it runs"


def _host(name: str, when: str, symptom: str, does: str, guard: str, *evidence: str) -> Trap:
    return Trap(name=name, kind="host", applies_when=when, symptom=symptom, what_we_do=does, evidence=evidence, guard=guard)


DIFFUSERS = (
    _host(
        "component-offload-grows",
        "enable_model_cpu_offload() on a pipeline that is called many times",
        "all components leave the device after each call and are copied back unchanged; RAM grows from call to call",
        "the call is refused on a managed pipeline; weights that wait in RAM are never copied back",
        _PIPELINE,
        "diffusers #7970",
        "diffusers 0.42.1 pipelines/pipeline_utils.py, maybe_free_model_hooks",
    ),
    _host(
        "sequential-offload",
        "enable_sequential_cpu_offload() on a pipeline",
        "one blocking copy from pageable RAM and one emptied cache a tensor: ten times slower; crashes with quantized weights",
        "the call is refused on a managed pipeline",
        _PIPELINE,
        "diffusers #10800",
        "accelerate 1.15.0 utils/modeling.py, set_module_tensor_to_device",
    ),
    _host(
        "group-offload-of-a-vae",
        "enable_group_offload() by blocks on a VAE, whose pipeline calls decode() and not forward()",
        "weights are on the CPU and inputs on the device: an error in the last step of the run",
        "the call is refused on a managed pipeline and on its components; here decode() itself brings the VAE in",
        _MODEL,
        "diffusers #12319",
        "diffusers 0.42.1 hooks/group_offloading.py",
    ),
    _host(
        "group-offload-applied-past-the-pipeline",
        "apply_group_offloading() on a component that something else places already",
        "two owners of the same weights: inputs and weights on different devices, or wrong images",
        "the call is refused, and the component stays as it was",
        "plugins/overflowml_diffusers/host.py, _patch_group_offloading",
        "diffusers #11981",
        "diffusers 0.42.1 hooks/group_offloading.py, apply_group_offloading",
    ),
    _host(
        "moved-after-offload",
        "pipe.to('cuda') after an offload was switched on",
        "a warning, and the offload is worth nothing any more; after sequential offload an error",
        "the call is refused with the way out",
        _PIPELINE,
        "diffusers 0.42.1 pipelines/pipeline_utils.py, DiffusionPipeline.to",
    ),
    _host(
        "layerwise-casting-stays",
        "enable_layerwise_casting() on a component",
        "it cannot be taken off again, and a second call raises; weights are cast without a scale",
        "the call is refused on managed components",
        _MODEL,
        "diffusers 0.42.1 hooks/layerwise_casting.py, deinitalize_hook",
    ),
    _host(
        "pipeline-device-map-drops-a-component",
        "device_map='balanced' for a pipeline of which two components do not fit",
        "the first of them gets no device at all",
        "device_map beside overflow= is refused, and the plan places every component",
        "plugins/overflowml_diffusers/host.py, from_pretrained",
        "diffusers 0.42.1 pipelines/pipeline_loading_utils.py, _assign_components_to_devices",
        "diffusers #11555",
    ),
    _host(
        "from-pipe-upcasts",
        "from_pipe() without a dtype on a pipeline in bfloat16",
        "the shared components are cast to float32, in the first pipeline too: twice the memory",
        "the cast of a managed component is held against the plan's budget, and refused with the way out where it does not fit",
        "overflowml_core/runtime/recast.py",
        "diffusers 0.42.1 pipelines/pipeline_utils.py, from_pipe",
    ),
    _host(
        "two-owners-of-a-component",
        "two pipelines share components, and an offload is switched on for the second",
        "the hooks of the second replace those of the first, which is broken from then on",
        "both an offload and a second plan are refused as long as a component is managed",
        "overflowml_core/session.py, manage; plugins/overflowml_diffusers/attach.py, Placement.detach_hook",
        "diffusers 0.42.1 pipelines/pipeline_utils.py, enable_model_cpu_offload",
    ),
    _host(
        "sdxl-vae-overflows",
        "SDXL's VAE decodes in float16",
        "infinities: a black image. The pipeline casts the VAE to float32 for the decode, which an offload must not undo or refuse",
        "the pipeline's own cast is carried out within the budget, and taken back",
        "plugins/overflowml_diffusers/attach.py, _guard_component",
        "diffusers 0.42.1 pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py, force_upcast",
    ),
    _host(
        "slices-of-a-managed-unet",
        "enable_attention_slicing() on a pipeline whose weights are offloaded",
        "slices read weights that are gone, or memory that was given back",
        "the call is let through: its result is the same as without a plan, bit for bit",
        _BLOCKS,
        "diffusers #14438",
    ),
)
"""Traps of diffusers' calls."""

TRANSFORMERS = (
    _host(
        "device-map-matches-prefixes",
        "a device_map that names a layer: {'model.layers.1': 'cpu', ...}",
        "layers 10 to 19 go there too, for the map is a pattern without an end",
        "a device_map beside overflow= is refused; the plan names every block in full",
        "plugins/overflowml_transformers/host.py, take_request",
        "transformers 5.23.0 integrations/accelerate.py, expand_device_map",
    ),
    _host(
        "pipeline-takes-the-first-device",
        "transformers.pipeline() over a model of which the first part is on disk",
        "inputs are sent to a device called 'disk'",
        "the device map of a managed model begins with the device that computes",
        "plugins/overflowml_transformers/attach.py, after_attach",
        "transformers 5.23.0 pipelines/base.py, Pipeline.__init__",
    ),
    _host(
        "generate-compiles-offloaded-layers",
        "generate() with a static cache on a model of which layers are elsewhere",
        "it compiles the forward pass, hooks and all: minutes of recompilation",
        "the device map of a managed model names the tiers of its layers, which leaves compilation off",
        "plugins/overflowml_transformers/attach.py, after_attach",
        "transformers 5.23.0 generation/utils.py, hf_device_map",
    ),
    _host(
        "pipeline-retries-in-float32",
        "transformers.pipeline() and a model that does not fit",
        "an error of the load is swallowed and the load repeated in float32, twice as large",
        "errors of the project are of no class that it swallows, so the first one arrives with its advice",
        "overflowml_core/errors.py, OverflowmlError",
        "transformers 5.23.0 pipelines/base.py, load_model",
    ),
    _host(
        "weights-loaded-into-a-managed-model",
        "load_state_dict() on a model whose layers are offloaded",
        "the values go to a copy and are lost, without an error",
        "the call is refused on managed models",
        "plugins/overflowml_transformers/attach.py, _MOVES",
        "diffusers #11981",
    ),
    _host(
        "save-of-an-offloaded-model",
        "save_pretrained() on a model whose layers are offloaded",
        "an error that a hook is missing, or files full of nothing",
        "a managed model saves what it was loaded from: its parameters can be read at any time",
        "overflowml_core/runtime/homes.py",
        "transformers #46902",
        "transformers 5.23.0 integrations/accelerate.py, load_offloaded_parameter",
    ),
    _host(
        "parts-that-are-never-called",
        "a module reads the weights of a child without calling it (attention pooling of SigLIP)",
        "offload by leaves never brings these weights in: an error about devices",
        "blocks are moved as one, and what is outside of them stays",
        _BLOCKS,
        "diffusers 0.42.1 hooks/group_offloading.py, leaf_level",
        "transformers 5.23.0 models/siglip/modeling_siglip.py, SiglipMultiheadAttentionPoolingHead",
    ),
    _host(
        "fused-kernels-read-children",
        "a fused kernel reads the weights of its children (Mamba's convolution)",
        "offload by leaves computes with weights that are not there",
        "blocks are moved as one",
        _BLOCKS,
        "transformers 5.23.0 models/mamba2/modeling_mamba2.py, force_accelerate_hooks",
    ),
    _host(
        "buffers-stay-behind",
        "a layer that is left unread when the model is loaded has buffers that are saved (DeepSeek's e_score_correction_bias)",
        "the buffer is empty when the layer runs: an error, or wrong experts",
        "such buffers are loaded with the model and moved with their block",
        "plugins/overflowml_transformers/defer.py",
        "transformers 5.23.0 models/deepseek_v3/modeling_deepseek_v3.py",
    ),
    _host(
        "tied-head-is-split",
        "the output layer shares its weight with the embedding, and one of them is offloaded",
        "the weight is there twice, and a change of one is none of the other",
        "shared weights are placed once, and shared again after release",
        "overflowml_core/runtime/structure.py",
        "accelerate 1.15.0 hooks.py, tied_params_map",
    ),
    _host(
        "weights-in-pickle",
        "a checkpoint that exists only as pickle (pytorch_model.bin)",
        "its code runs when it is read, and it cannot be read in parts",
        "it is refused with the way out, before anything of it is read",
        "overflowml_core/inspect/checkpoint.py",
        "transformers 5.23.0 modeling_utils.py, load_state_dict",
    ),
)
"""Traps of transformers' calls."""

ACCELERATE = (
    _host(
        "hooks-removed-by-others",
        "accelerate removes or adds hooks on a part that something else has placed (remove_hook_from_module, cpu_offload)",
        "half of the placement is gone, and the next call fails far away",
        "both are refused on managed components",
        "plugins/overflowml_diffusers/attach.py, Placement.detach_hook",
        "accelerate 1.15.0 hooks.py, remove_hook_from_module",
    ),
    _host(
        "parts-moved-by-hand",
        "a part of an offloaded model is moved or cast by itself (model.model.layers[0].to(...))",
        "weights and inputs on different devices, far from the line that did it",
        "every part of a managed model refuses to be moved or cast",
        _PARTS,
        "accelerate 1.15.0 hooks.py, AlignDevicesHook",
    ),
    _host(
        "copies-of-an-offloaded-model",
        "copy.deepcopy() or pickle of an offloaded model",
        "a copy whose hooks point at the first one, or which is empty",
        "both are refused on managed models",
        _PARTS,
        "accelerate 1.15.0 hooks.py, add_hook_to_module",
    ),
    _host(
        "offload-folder-of-another-model",
        "a folder for offloaded weights is used again for another model of the same shape",
        "its files are taken for the new ones because they are there: wrong results without an error",
        "packed weights are named by what they hold, and of live models kept apart",
        "overflowml_core/runtime/store.py",
        "diffusers 0.42.1 hooks/group_offloading.py, offload_to_disk_path",
    ),
)
"""Traps of accelerate's calls, and of what hosts do by its means."""

TRAPS: tuple[Trap, ...] = (*DIFFUSERS, *TRANSFORMERS, *ACCELERATE)
"""Traps that a call of a host's own leads into; each with the guard that holds on a managed model."""
