"""A transformers model as a network: built by the host's own code on the meta device, so that a folder and the loaded
model give the same facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overflowml_core import session
from overflowml_core.activations import language_model_bytes
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Component, Limits, Network, Workload, network_fingerprint
from overflowml_core.inspect import open_checkpoint
from overflowml_core.loading import Loading, loading
from overflowml_core.runtime.structure import describe_module


def describe_model(model: Any, workload: Workload, name: str = "model", phase: str | None = None) -> Network:
    """Describe a live model; see :func:`component_of`."""
    component = component_of(model, workload, name, phase)
    class_name = type(model).__name__
    return Network((component,), f"a live {class_name}", class_name, network_fingerprint((component,)))


def component_of(model: Any, workload: Workload, name: str, phase: str | None = None) -> Component:
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


def build_without_weights(folder: Path, options: dict[str, object]) -> Any:
    """The model as ``from_pretrained`` would give it, on the meta device.

    Raises:
        NotAModel, BadCheckpoint: as for :func:`describe_folder`.
    """
    import transformers

    options = {name: value for name, value in options.items() if name != "output_loading_info"}
    open_checkpoint(folder / str(options.get("subfolder") or ""), variant=options.get("variant"))  # type: ignore[arg-type]
    config = options.pop("config", None)
    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(folder, subfolder=options.get("subfolder") or "")
    except (ValueError, OSError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise NotAModel(folder, f"transformers cannot read its config.json ({first_line})") from error
    architectures = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, name, None) for name in architectures), None)
    if model_class is None:
        raise NotAModel(
            folder,
            f"its architecture {architectures or 'is not named in config.json and'} is not in transformers {transformers.__version__}",
        )
    try:
        with session.hosts(), loading(Loading(Limits(), describe_only=True)):
            return model_class.from_pretrained(str(folder), config=config, **options)
    except OverflowmlError:
        raise
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise NotAModel(folder, f"{model_class.__name__} cannot be built from its config.json ({type(error).__name__}: {error})") from error


def estimate_activation_bytes(model: Any, workload: Workload) -> int:
    """Peak of activations and KV cache of one forward pass in bytes, from the config alone."""
    generates = bool(getattr(model, "can_generate", lambda: False)())
    return language_model_bytes(model.config, workload, _element_bytes(model), generates)


def _element_bytes(model: Any) -> int:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return 2 if parameter is None else int(parameter.element_size())
