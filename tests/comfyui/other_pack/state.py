"""What the host is made of while it runs: every function of its modules and its numbers, so that a test sees what a pack changed."""

from __future__ import annotations

import gc
import json
import sys
import types

_OURS = ("overflowml", "ComfyUI-OverflowML", "comfyui_nodes")
_HOSTS = ("comfy.", "comfy_execution.", "nodes", "execution", "server", "folder_paths", "latent_preview")
_NUMBERS_OF = ("comfy.model_management", "comfy.memory_management", "comfy.model_patcher", "comfy.sampler_helpers", "comfy.ops")


def of_host():
    """Names of the host's functions, methods and plain numbers, with what they are now."""
    found, foreign = {}, []
    for name, module in sorted(sys.modules.items()):
        if module is None or not name.startswith(_HOSTS):
            continue
        for key, value in list(vars(module).items()):
            _note(found, foreign, f"{name}.{key}", value)
            if isinstance(value, type) and value.__module__ == name:
                for inner, member in list(vars(value).items()):
                    _note(found, foreign, f"{name}.{key}.{inner}", member)
            if name in _NUMBERS_OF and isinstance(value, (bool, int, float, str)):
                found[f"{name}.{key}"] = repr(value)
    return {"found": found, "foreign": foreign}


def _note(found, foreign, path, value):
    inner = getattr(value, "__func__", value)
    if isinstance(inner, types.FunctionType):
        found[path] = f"{inner.__module__}.{inner.__qualname__} {id(inner)}"
        if str(inner.__module__).startswith(_OURS) or any(part in (inner.__code__.co_filename or "") for part in _OURS):
            foreign.append(path)


def of_patcher(patcher):
    """What hangs on a patcher and on its modules, as text that is the same for the same."""
    module = patcher.model.diffusion_model
    values = {
        "patches": sorted(str(key) for key in patcher.patches),
        "object_patches": sorted(patcher.object_patches),
        "wrappers": {str(kind): sorted(str(key) for key in keys) for kind, keys in patcher.wrappers.items() if keys},
        "callbacks": {str(kind): sorted(str(key) for key in keys) for kind, keys in patcher.callbacks.items() if keys},
        "attachments": sorted(str(key) for key in patcher.attachments),
        "model_options": sorted(str(key) for key in patcher.model_options),
        "attributes": sorted(vars(patcher)),
        "module": sorted(vars(module)),
        "hooked": sorted(
            name for name, one in module.named_modules() if one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one)
        ),
        "bytes": sum(weight.nbytes for weight in module.parameters()),
    }
    return json.dumps(values, sort_keys=True)


def of_memory():
    """Models that are alive, and what the host says it has loaded."""
    import comfy.model_management as management

    gc.collect()
    alive = sum(type(one).__module__ == "comfy.ldm.flux.model" and type(one).__name__ == "Flux" for one in gc.get_objects())
    loaded = [int(one.model_loaded_memory()) for one in management.current_loaded_models if one.model is not None]
    return {"alive": alive, "loaded": loaded, "reserve": int(management.EXTRA_RESERVED_VRAM)}


def add_route():
    """Answer ``/tests/host`` and ``/tests/memory``."""
    from aiohttp import web
    from server import PromptServer

    @PromptServer.instance.routes.get("/tests/host")
    async def host(_):
        return web.json_response(of_host())

    @PromptServer.instance.routes.get("/tests/memory")
    async def memory(_):
        return web.json_response(of_memory())
