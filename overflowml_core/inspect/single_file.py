"""A safetensors file (or a folder of shards) without configuration as a network, by its header alone. Knows nothing of model code."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from overflowml_core.errors import NotAModel
from overflowml_core.facts import Component, Network, TensorFact, Workload, network_fingerprint
from overflowml_core.inspect.checkpoint import checkpoint_of_files
from overflowml_core.inspect.image_shapes import family_of, image_component
from overflowml_core.inspect.language_shapes import language_component
from overflowml_core.inspect.tensor_groups import ComponentName

_PREFIXES = (
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("cond_stage_model.", "text_encoder"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
    ("text_encoders.", "text_encoder_4"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("transformer.", "transformer"),
    ("unet.", "unet"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)
"""Beginnings of names in checkpoints of whole pipelines, and the components that they hold, in the order in which these run. The first
that fits counts. Sources: configurations of Stability's generative-models and the converters in diffusers 0.42
(loaders/single_file_utils.py)."""

_LEFT_OUT = ("model_ema.",)
"""A second copy of the weights that no host loads."""

_SHARD = re.compile(r".*-[0-9]{5}-of-([0-9]{5})\.safetensors", re.ASCII)
_SHOWN_NAMES = 3


def network_of_file(path: str | os.PathLike[str], workload: Workload) -> Network:
    """Describe a single-file checkpoint: of a whole pipeline, or of one model.

    Args:
        path: a *.safetensors file.
        workload: what it will be asked to do.

    Raises:
        BadCheckpoint: the file is damaged.
        NotAModel: it holds no weights of a model (an empty file, a LoRA).
    """
    return _network(Path(path), [Path(path)], workload)


def network_of_weights(folder: str | os.PathLike[str], workload: Workload) -> Network | None:
    """Describe a folder that holds nothing but weights, by their headers: one *.safetensors file, or all shards of one model.

    Args:
        folder: without config.json and model_index.json.
        workload: what it will be asked to do.

    Returns:
        None where there is no *.safetensors file.

    Raises:
        BadCheckpoint: a file is damaged.
        NotAModel: there are several files that are not shards of one model.
    """
    root = Path(folder)
    files = sorted(path for path in root.iterdir() if path.suffix == ".safetensors" and path.is_file())
    if not files:
        return None
    counts = {match[1] if (match := _SHARD.fullmatch(path.name)) else None for path in files}
    shards = len(counts) == 1 and int(counts.pop() or 0) == len(files)
    if not shards and (len(files) > 1 or _SHARD.fullmatch(files[0].name)):
        shown = ", ".join(path.name for path in files[:_SHOWN_NAMES])
        raise NotAModel(
            root,
            f"{len(files)} safetensors files ({shown}) and no config.json: not all shards of one model; add the others, or give a file",
        )
    return _network(root, files, workload)


def _network(source: Path, files: Sequence[Path], workload: Workload) -> Network:
    checkpoint = checkpoint_of_files(files)
    tensors = [
        TensorFact(located.entry.name, located.entry.shape, located.entry.dtype, located.entry.nbytes)
        for located in checkpoint.tensors.values()
    ]
    tensors = [tensor for tensor in tensors if not tensor.name.startswith(_LEFT_OUT)]
    if not any(tensor.nbytes for tensor in tensors):
        raise NotAModel(source, "it holds no weights; give the file of a model")
    if all("lora" in tensor.name.lower() or tensor.name.endswith(".alpha") for tensor in tensors):
        raise NotAModel(source, "it holds a LoRA alone; give the model that it was made for")
    components = tuple(_component(name, members, workload) for name, members in _components(tensors))
    family = next(
        (family for _, members in _components(tensors) if (family := family_of(members)) is not None and family.kind != "vae"), None
    )
    class_name = (
        components[0].class_name
        if len(components) == 1
        else f"a pipeline around {family.class_name if family else components[0].class_name}"
    )
    return Network(components, str(source), class_name, network_fingerprint(components))


def _components(tensors: Sequence[TensorFact]) -> list[tuple[str, list[TensorFact]]]:
    """The components in the order in which they run, each with its tensors under their names inside it.

    Tensors of no component (schedules, scales of a prompt's logits) go to the largest, so that every byte is counted.
    """
    found: dict[str, list[TensorFact]] = {}
    rest: list[TensorFact] = []
    whole = any(tensor.name.startswith(("model.diffusion_model.", "first_stage_model.", "vae.")) for tensor in tensors)
    for tensor in tensors:
        prefix, name = next(((prefix, name) for prefix, name in _PREFIXES if tensor.name.startswith(prefix)), ("", ""))
        if not name or (prefix == "transformer." and not whole and "transformer_blocks." not in tensor.name):
            rest.append(tensor)  # "transformer.h.0" is GPT-2, not a component
        else:
            found.setdefault(name, []).append(TensorFact(tensor.name.removeprefix(prefix), tensor.shape, tensor.dtype, tensor.nbytes))
    if not found:
        return [("model", rest)]
    if rest:
        max(found.values(), key=lambda members: sum(tensor.nbytes for tensor in members)).extend(rest)
    order = list(dict.fromkeys(name for _, name in _PREFIXES))
    family = family_of(found.get("transformer", ()))
    renamed = "unet" if family is not None and family.kind == "unet" else "transformer"
    return [(renamed if name == "transformer" else name, found[name]) for name in order if name in found]


def _component(name: str, tensors: list[TensorFact], workload: Workload) -> Component:
    # Names of text models occur inside image models, not the other way round.
    named = ComponentName(name, "")
    if family_of(tensors) is None:
        language = language_component(named, tensors, workload)
        if language is not None:
            return language
    component = image_component(named, tensors, workload)
    return component if component.class_name else image_component(ComponentName(name, "an unknown model"), tensors, workload)
