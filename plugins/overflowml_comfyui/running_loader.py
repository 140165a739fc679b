"""With ``running_host`` what touches the running host: which layers of a file it could quantize, what its device can run, and its loaders.

Imports the host inside functions, and patches nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overflowml_comfyui.formats import FORMATS, HostFormat
from overflowml_comfyui.quantized_file import light
from overflowml_comfyui.source import SUFFIXES, Source, check_kind, open_source
from overflowml_core.errors import NotAModel, OverflowmlError, Unsupported

if TYPE_CHECKING:
    from overflowml_comfyui.encoding import Encoder

_log = logging.getLogger("overflowml")

FOLDERS = ("diffusion_models", "checkpoints")
_MADE_IN = "diffusion_models"


def sources() -> list[str]:
    """Files that a model may be loaded from, as "folder kind/name"."""
    import folder_paths

    names = [f"{kind}/{name}" for kind in FOLDERS for name in folder_paths.get_filename_list(kind)]
    return [name for name in names if name.lower().endswith(SUFFIXES)]


def source_of(label: str) -> Source:
    """The file that a label of :func:`sources` names, with its header.

    Raises:
        OverflowmlError: it is no such file, or none that is read here.
    """
    import folder_paths

    kind, _, name = label.partition("/")
    check_kind(Path(name))
    path = folder_paths.get_full_path(kind, name) if kind in FOLDERS and name else None
    if path is None:
        raise NotAModel(label, "it is in none of ComfyUI's folders of diffusion models and checkpoints any more; choose another one")
    return open_source(Path(path), label)


def prefix_of(source: Source) -> str:
    """What the names of the diffusion model's tensors begin with in a file, by the host's own rule."""
    import comfy.model_detection as detection

    prefix: str = detection.unet_prefix_from_state_dict(dict.fromkeys(source.tensors))
    return prefix


def linear_layers(source: Source) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers of a model that the host would read in a format: it builds the model itself, without data.

    Args:
        source: the diffusion model in its file.

    Raises:
        NotAModel: the host does not know the architecture.
        Unsupported: the host has no formats, or renames the file's weights when it loads them.
    """
    import comfy.model_detection as detection
    import torch

    weights = light(source)  # some kinds are told apart by values, all of them small
    try:
        config = detection.model_config_from_unet(dict(weights), "", metadata=dict(source.header.metadata))
    except Exception as error:  # noqa: BLE001 -- detection indexes what it expects of a kind, and raises what that gives
        raise NotAModel(source.path.name, f"ComfyUI cannot tell its architecture ({type(error).__name__}: {error})") from None
    if config is None:
        if any(name.startswith(("transformer_blocks.", "down_blocks.", "single_transformer_blocks.")) for name in weights):
            raise Unsupported(
                f"{source.path.name}: it has the names of diffusers, which ComfyUI rearranges; give the original file of the model"
            )
        raise NotAModel(source.path.name, "ComfyUI does not know its architecture; choose the file of a diffusion model that it can load")
    if not hasattr(type(config), "quant_config"):
        raise Unsupported("This ComfyUI knows no quantized weights; update it")
    config.quant_config = {"mixed_ops": True}  # has it take the class of layers that it takes for quantized files
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(dict(weights), "", device=torch.device("meta"))
    modules = model.diffusion_model.named_modules()
    # The class for quantized files remembers the shape of its weight; nothing else of the host does so for two dimensions.
    shapes = {name: getattr(module, "_orig_shape", None) for name, module in modules if not isinstance(module, torch.nn.Embedding)}
    return {name: tuple(shape) for name, shape in shapes.items() if isinstance(shape, tuple) and len(shape) == 2}


def is_native(one: HostFormat) -> bool:
    """Whether the host's device has products for a format, so that it decodes no weight before them."""
    import comfy.model_management as management

    device = management.get_torch_device()
    if device.type != "cuda":
        return False
    if one.name == "int8":
        import torch

        return bool(torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5))
    ask = getattr(management, f"supports_{one.name}_compute", None)
    return bool(ask(device)) if callable(ask) else False


def offered() -> list[str]:
    """The formats that this host knows and its device has arithmetic for. Nothing is tried for it."""
    return [name for name, one in FORMATS.items() if not unknown(one)]


def missing(one: HostFormat) -> str:
    """Why this host, or its device, cannot run a format; empty where a small weight was converted and decoded on it."""
    import comfy.model_management as management

    why_not = unknown(one)
    fault = "" if why_not else encoder(one).fault()
    name = management.get_torch_device_name(management.get_torch_device())
    return f"{one.name}: it does not work on this device ({name}: {fault}); choose another format" if fault else why_not


def unknown(one: HostFormat) -> str:
    """Why this host does not know a format, or its device has no arithmetic for it; empty otherwise. Nothing is tried for it."""
    import comfy.model_management as management

    if _layout(one) is None:
        return f"{one.name}: this ComfyUI, or its comfy-kitchen, does not know it; update ComfyUI or choose another format"
    if one.name not in ("mxfp8", "nvfp4") or is_native(one):
        return ""
    return (
        f"{one.name}: this device ({management.get_torch_device_name(management.get_torch_device())}) has no arithmetic for it "
        "(NVIDIA's has from Blackwell on), and ComfyUI would decode every weight at every step; choose int8 or fp8"
    )


def encoder(one: HostFormat) -> Encoder:
    """What makes a format, on the host's device."""
    import comfy.model_management as management

    from overflowml_comfyui.encoding import Encoder

    return Encoder(one, _layout(one), management.get_torch_device())


def _layout(one: HostFormat) -> Any:
    try:
        import comfy.quant_ops as quantization
    except ImportError:  # hosts before 2026
        return None
    known = getattr(quantization, "QUANT_ALGOS", {}).get(one.algorithm)
    find = getattr(quantization, "get_layout_class", None)
    return find(known["comfy_tensor_layout"]) if known is not None and callable(find) else None


def places(source: Source) -> list[Path]:
    """Folders where the host looks for diffusion models, the best for a file that is made from ``source`` first: beside it."""
    import folder_paths

    folders = [Path(folder) for folder in folder_paths.get_folder_paths(_MADE_IN)]
    folders.sort(key=lambda folder: folder.name != _MADE_IN)  # the older name of the folder comes first in the host's list
    beside = [source.path.parent] if source.label.startswith(f"{_MADE_IN}/") else []
    for folder in folders[:1]:
        folder.mkdir(parents=True, exist_ok=True)
    return list(dict.fromkeys([*beside, *folders]))


def progress() -> Callable[[int, int], None]:
    """Shows progress in the node, and raises the host's own exception where the run was cancelled."""
    import comfy.model_management as management
    import comfy.utils

    steps = 1000
    bar = comfy.utils.ProgressBar(steps)

    def show(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(steps * done // max(total, 1), steps)

    return show


def load(path: Path) -> Any:
    """A MODEL as the host's own loader makes it, with all that other nodes look for on one.

    Raises:
        OverflowmlError: the host could not load it; in its own words.
    """
    import comfy.sd

    return _loaded(path, lambda: comfy.sd.load_diffusion_model(str(path)))


def load_as_stored(source: Source) -> Any:
    """The model of a file that nothing was done to."""
    import comfy.sd
    import folder_paths

    if source.label.startswith(f"{_MADE_IN}/"):
        return load(source.path)
    embeddings = folder_paths.get_folder_paths("embeddings")

    def checkpoint() -> Any:
        return comfy.sd.load_checkpoint_guess_config(str(source.path), output_vae=False, output_clip=False, embedding_directory=embeddings)[
            0
        ]

    return _loaded(source.path, checkpoint)


def _loaded(path: Path, loader: Callable[[], Any]) -> Any:
    try:
        model = loader()
    except (RuntimeError, ValueError, KeyError) as error:
        raise OverflowmlError(f"{path.name}: ComfyUI cannot load it ({error})") from error
    if model is None:
        raise NotAModel(path.name, "ComfyUI found no diffusion model in it")
    return model


def quantized_layers(model: Any) -> dict[str, str]:
    """Names of the layers of a MODEL that are quantized, each with the host's name of its format."""
    found = {}
    for name, module in model.model.diffusion_model.named_modules():
        algorithm = getattr(module, "quant_format", None)
        if isinstance(algorithm, str):
            found[name] = algorithm
    return found
