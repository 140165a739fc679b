"""A diffusers pipeline or model as a network: its components in the order in which they run, and which of them share the
device at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overflowml_core import session
from overflowml_core.activations import decoder_bytes, diffusion_transformer_bytes, first_int, language_model_bytes, unet_bytes
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Component, Limits, Network, Workload, network_fingerprint
from overflowml_core.loading import Loading, loading
from overflowml_core.quantizers import refuse_quantizer
from overflowml_core.runtime.component import describe_module
from overflowml_diffusers.packed import know_packed_weights

_DENOISERS = ("transformer", "unet", "prior")
"""Components that companions (ControlNets, adapters) run together with, in the order of preference."""

_COMPANIONS = ("controlnet", "adapter", "motion_adapter", "t2i_adapter", "brushnet", "image_proj")
"""Beginnings of names of components that run inside the denoising loop beside the denoiser."""


def ordered_modules(pipe: Any) -> dict[str, Any]:
    """The modules of a pipeline by name, each once, in the order in which the pipeline runs them.

    The pipeline's own ``model_cpu_offload_seq`` gives the order; what it leaves out comes before the first denoiser, where
    encoders of images belong, and safety checkers come last.
    """
    import torch

    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    sequence = [name for name in (getattr(type(pipe), "model_cpu_offload_seq", None) or "").split("->") if name in modules]
    others = [name for name in modules if name not in sequence]
    first_denoiser = next((i for i, name in enumerate(sequence) if name.startswith(_DENOISERS)), len(sequence))
    early = [name for name in others if name != "safety_checker" and name not in ("vae", "vqvae", "movq", "vocoder")]
    late = [name for name in others if name not in early]
    names = sequence[:first_denoiser] + early + sequence[first_denoiser:] + late
    ordered: dict[str, Any] = {}
    seen: set[int] = set()
    for name in _companions_beside(names):
        if id(modules[name]) not in seen:
            seen.add(id(modules[name]))
            ordered[name] = modules[name]
    return ordered


def _companions_beside(names: list[str]) -> list[str]:
    """The same names with companions right before their denoiser, so that equal phases stand together."""
    denoiser = _denoiser(names)
    if denoiser is None:
        return names
    companions = [name for name in names if _is_companion(name)]
    rest = [name for name in names if not _is_companion(name)]
    at = rest.index(denoiser)
    return rest[:at] + companions + rest[at:]


def _is_companion(name: str) -> bool:
    return name.startswith(_COMPANIONS)


def _denoiser(names: list[str]) -> str | None:
    return next((name for wanted in _DENOISERS for name in names if name == wanted), None)


def describe_pipeline(pipe: Any, workload: Workload) -> Network:
    """Describe a live pipeline.

    Raises:
        NotAModel: it has no modules.
    """
    modules = ordered_modules(pipe)
    if not modules:
        raise NotAModel(f"a {type(pipe).__name__}", "it has no components with weights")
    denoiser = _denoiser(list(modules))
    components = tuple(
        _component(name, module, workload, denoiser if denoiser is not None and _is_companion(name) else name)
        for name, module in modules.items()
    )
    class_name = type(pipe).__name__
    return Network(components, f"a live {class_name}", class_name, network_fingerprint(components))


def describe_model(model: Any, workload: Workload) -> Network:
    """Describe a single live model."""
    component = _component("model", model, workload, "model")
    class_name = type(model).__name__
    return Network((component,), f"a live {class_name}", class_name, network_fingerprint((component,)))


def _component(name: str, module: Any, workload: Workload, phase: str) -> Component:
    refuse_quantizer(getattr(module, "hf_quantizer", None), type(module).__name__)
    know_packed_weights()
    estimate = estimate_activation_bytes(module, workload)
    return describe_module(module, name, phase, estimate, "analytic" if estimate else "none")


def estimate_activation_bytes(module: Any, workload: Workload) -> int:
    """Peak activations of one call in bytes, by the kind of the module; 0 where nothing is known of it."""
    config = getattr(module, "config", None)
    if config is None:
        return 0
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    element = 2 if parameter is None else int(parameter.element_size())
    kind = type(module).__name__
    channels = getattr(config, "block_out_channels", None) or getattr(config, "encoder_block_out_channels", None)
    if "Autoencoder" in kind or "VAE" in kind or kind == "VQModel":
        first = channels[0] if channels else first_int(config, "base_dim", "decoder_base_dim", "dim", default=128)
        if element == 2 and getattr(config, "force_upcast", False) and str(getattr(parameter, "dtype", "")) == "torch.float16":
            # Decoded in float32, weights and all.
            return decoder_bytes(int(first), workload, 4) + 2 * int(sum(p.numel() for p in module.parameters()))
        return decoder_bytes(int(first), workload, element)
    if ("UNet" in kind or "ControlNet" in kind) and channels:
        return unet_bytes(int(channels[0]), workload, element)
    if hasattr(config, "model_type"):  # a transformers config: an encoder of text or images
        return language_model_bytes(config, workload, element, generates=False)
    heads = first_int(config, "num_attention_heads", "num_heads", default=0)
    head_size = first_int(config, "attention_head_dim", "head_dim", default=0)
    width = heads * head_size or first_int(config, "hidden_size", "dim", "inner_dim", default=0)
    guided = not getattr(config, "guidance_embeds", False)
    return diffusion_transformer_bytes(width, workload, element, guided) if width else 0


def describe_folder(folder: Path, kind: str, workload: Workload, options: dict[str, object]) -> Network:
    """Describe a pipeline or model in a folder, with weights or with configurations alone.

    Raises:
        NotAModel: the host cannot build it.
        BadCheckpoint: its files are broken.
    """
    built, config_only = build_folder(folder, kind, options)
    network = describe_pipeline(built, workload) if kind == "diffusers-pipeline" else describe_model(built, workload)
    source = f"{folder} (config only)" if config_only else str(folder)
    return Network(network.components, source, network.class_name, network.fingerprint)


def build_folder(folder: Path, kind: str, options: dict[str, object]) -> tuple[Any, bool]:
    """The pipeline or model of a folder, without data: built by the host's own loader, which leaves every weight unread; where there are
    no weights at all, out of its configurations.

    Returns:
        The pipeline or model, and whether there were only configurations.

    Raises:
        NotAModel: the host cannot build it.
        BadCheckpoint: its files are broken.
    """
    import diffusers

    from overflowml_diffusers import skeleton
    from overflowml_diffusers.host import check_model_source, check_pipeline_source

    place = folder / str(options.get("subfolder") or "")
    if skeleton.is_config_only(place, kind):
        build = skeleton.build_pipeline if kind == "diffusers-pipeline" else skeleton.build_model
        return build(place, options), True
    options = {name: value for name, value in options.items() if name != "output_loading_info"}
    loader = diffusers.DiffusionPipeline if kind == "diffusers-pipeline" else diffusers.AutoModel
    (check_pipeline_source if kind == "diffusers-pipeline" else check_model_source)(folder, dict(options))
    try:
        with session.hosts(), loading(Loading(Limits(), describe_only=True)):
            built = loader.from_pretrained(str(folder), **options)  # AutoModel joins it with other strings
    except OverflowmlError:
        raise
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise NotAModel(folder, f"diffusers cannot build it ({type(error).__name__}: {first_line})") from error
    return built, False
