"""A pack for the host under test, as other people write them: conditioning from a seed, patched and odd models, and a look at the host."""

from __future__ import annotations

import os

import torch

from . import card, state


class SeededConditioning:
    """Random embeddings with the shapes that the tiny Flux takes."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """One seed."""
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        """The conditioning."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 8, 32, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, 16, generator=generator), "guidance": 3.5}]],)


class PatchedModel:
    """A MODEL changed in each of the host's ways: wrappers, a callback, a function around the model, an object patch."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """One model."""
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        """The changed clone."""
        from comfy.patcher_extension import CallbacksMP, WrappersMP

        changed = model.clone()
        changed.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *a, **k: executor(*a, **k) * 0.75)
        changed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "other", lambda executor, *a, **k: executor(*a, **k) + 0.5)
        changed.add_callback_with_key(CallbacksMP.ON_LOAD, "other", lambda *_: None)
        changed.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * 1.25)
        changed.add_object_patch("model_sampling", changed.get_model_object("model_sampling"))
        return (changed,)


class OddModel:
    """What claims to be a MODEL: an object, a patcher of something that is no torch module, a patcher of a module that nobody knows."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """Which."""
        return {"required": {"kind": (["object", "no module", "unknown module"],)}}

    def make(self, kind):
        """The model."""
        from comfy.model_patcher import ModelPatcher

        device = torch.device("cpu")
        if kind == "object":
            return (object(),)
        if kind == "no module":
            made = ModelPatcher(torch.nn.Linear(4, 4), device, device)
            made.model = "text"
            return (made,)
        return (ModelPatcher(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), device, device),)


class LookAtModel:
    """What hangs on a MODEL, as text; the MODEL is handed on."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "look"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        """One model, and a number that makes the host look again: older ones do not repeat what a cached node showed."""
        return {"required": {"model": ("MODEL",), "look": ("INT", {"default": 0})}}

    def look(self, model, look):
        """See."""
        return {"ui": {"text": [state.of_patcher(model)]}, "result": (model,)}


NODE_CLASS_MAPPINGS = {one.__name__: one for one in (SeededConditioning, PatchedModel, OddModel, LookAtModel)}

state.add_route()
if os.environ.get("OVERFLOWML_TEST_CARD"):
    card.pretend(int(os.environ["OVERFLOWML_TEST_CARD"]))
