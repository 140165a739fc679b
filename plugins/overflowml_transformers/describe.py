"""A transformers model as a network: built by the host's own code on the meta device, so that a folder and the loaded model give the same facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Component, Network, Workload, network_fingerprint
from overflowml_core.inspect import open_checkpoint
from overflowml_core.loading import Loading, loading
from overflowml_core.runtime.structure import describe_module

_ASSUMED_TOKENS = 1024
"""Tokens that activations and caches are estimated for where the workload names none."""


def describe_model(model: Any, workload: Workload, name: str = "model", phase: str | None = None) -> Network:  # noqa: ANN401
    """Describe a live model; see :func:`component_of`."""
    component = component_of(model, workload, name, phase)
    class_name = type(model).__name__
    return Network((component,), f"a live {class_name}", class_name, network_fingerprint(class_name, (component,)))


def component_of(model: Any, workload: Workload, name: str, phase: str | None = None) -> Component:  # noqa: ANN401
    """A transformers model as one component, with an analytic estimate of its activations."""
    return describe_module(model, name, phase, estimate_activation_bytes(model, workload), "analytic")


def describe_folder(folder: Path, workload: Workload, options: dict[str, object]) -> Network:
    """Describe the model in a folder by its config and the headers of its files.

    Raises:
        NotAModel: the config names no architecture of the installed transformers.
        BadCheckpoint: its files are broken.
    """
    model = build_without_weights(folder, options)
    network = describe_model(model, workload)
    return Network(network.components, str(folder), network.class_name, network.fingerprint)


def build_without_weights(folder: Path, options: dict[str, object]) -> Any:  # noqa: ANN401
    """The model as ``from_pretrained`` would give it, on the meta device.

    Raises:
        NotAModel, BadCheckpoint: as for :func:`describe_folder`.
    """
    import transformers

    from overflowml_transformers.host import deferring

    open_checkpoint(folder, variant=options.get("variant"))  # type: ignore[arg-type]
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise NotAModel(folder, f"transformers cannot read its config.json ({first_line})") from error
    architectures = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, name, None) for name in architectures), None)
    if model_class is None:
        raise NotAModel(folder, f"its architecture {architectures or 'is not named in config.json and'} is not in transformers {transformers.__version__}")
    try:
        with deferring(), loading(Loading(limits=_no_limits(), describe_only=True)):
            return model_class.from_pretrained(folder, config=config, **options)
    except OverflowmlError:
        raise
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise NotAModel(folder, f"{model_class.__name__} cannot be built from its config.json ({type(error).__name__}: {error})") from error


def _no_limits() -> Any:  # noqa: ANN401
    from overflowml_core.facts import Limits

    return Limits()


def estimate_activation_bytes(model: Any, workload: Workload) -> int:  # noqa: ANN401
    """Peak of activations and KV cache of one forward pass, from the config alone.

    Counts, per token: the residual stream and attention's projections (8 hidden vectors), the feed-forward's intermediates (3 vectors), keys and
    values of all layers; and logits for one position per sequence, as ``generate`` computes them. Compared with runs of the same models
    under fake tensors (Llama-3.1-70B, 2048 tokens: 1173 MiB with its cache) it is within a quarter; the profile by fake tensors replaces it.

    Returns:
        Bytes.
    """
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = _first_int(text, "hidden_size", "d_model", "n_embd", default=1024)
    layers = _first_int(text, "num_hidden_layers", "num_layers", "n_layer", default=24)
    heads = _first_int(text, "num_attention_heads", "num_heads", "n_head", default=16)
    kv_heads = _first_int(text, "num_key_value_heads", default=heads)
    head_size = _first_int(text, "head_dim", "d_kv", default=max(hidden // max(heads, 1), 1))
    intermediate = _first_int(text, "intermediate_size", "d_ff", "n_inner", default=4 * hidden)
    vocabulary = _first_int(text, "vocab_size", default=0)
    element = _element_bytes(model)
    batch = workload.batch
    tokens = (workload.prompt_tokens or _ASSUMED_TOKENS) * batch
    context = tokens + (workload.new_tokens or 0) * batch
    generates = bool(getattr(model, "can_generate", lambda: False)())
    cache = 2 * kv_heads * head_size * layers * element * context if generates else 0
    logits = vocabulary * 4 * batch if generates else 0
    return (8 * hidden + 3 * intermediate) * tokens * element + cache + logits


def _first_int(config: Any, *names: str, default: int) -> int:  # noqa: ANN401
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def _element_bytes(model: Any) -> int:  # noqa: ANN401
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return 2 if parameter is None else int(parameter.element_size())
