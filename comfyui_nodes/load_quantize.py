"""The node that loads a model in a format that the plan chose. What it decides is in ``overflowml_comfyui``."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from overflowml_comfyui import loader, running_host
from overflowml_comfyui.formats import FORMATS
from overflowml_core.errors import OverflowmlError

from .nodes import described, watched
from .schema import PlanType, budget_fields, schema, shown, size_fields


class LoadAndQuantize(io.ComfyNode):
    """Quantizes a model once, block by block, and loads it from its file ever after."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return schema(
            node_id="OverflowMLLoadAndQuantize",
            display_name="OverflowML Load & Quantize",
            description=(
                "Loads a diffusion model with the weights of its linear layers in a smaller format, as the plan for a budget says. "
                "The quantized file is made once, weight by weight, beside ComfyUI's diffusion models."
            ),
            search_aliases=["overflowml", "quantize", "int8", "fp8", "nvfp4", "mxfp8", "load diffusion model", "low vram", "unet loader"],
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "file", options=loader.sources(), tooltip="A diffusion model, or a checkpoint of which the diffusion model is taken."
                ),
                io.Combo.Input(
                    "format",
                    options=[loader.AUTO, *loader.offered()],
                    default=loader.AUTO,
                    tooltip="auto: the plan decides, and leaves weights as they are where they fit as fast. Else every layer that may be "
                    "quantized is. int8 is the most exact; only formats that this device can run are listed.",
                ),
                io.Combo.Input(
                    "quality",
                    options=["minimal", "any"],
                    default="minimal",
                    tooltip="What auto may lose: minimal permits formats of 8 bits, any those of 4 bits as well.",
                ),
                *budget_fields(),
                *size_fields(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.String.Output(display_name="PATH"),
                PlanType.Output(display_name="PLAN"),
                io.String.Output(display_name="REPORT"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file: Any, format: Any) -> bool | str:
        """Take what is not in the lists, too, and say in a sentence what is wrong with it."""
        if format != loader.AUTO and format not in FORMATS:
            return f"format={format!r}: not one of {', '.join((loader.AUTO, *FORMATS))}"
        try:
            loader.check(file)
        except OverflowmlError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **fields: Any) -> str:
        """A source that changed is quantized and loaded again."""
        return loader.stamp_of(file)

    @classmethod
    def execute(cls, file: str, format: str = loader.AUTO, quality: str = "minimal", **fields: Any) -> io.NodeOutput:
        """Plan, make the file where it is not there yet, and load it with ComfyUI's own loader."""
        loaded = loader.obtain(file, None if format == loader.AUTO else format, quality, fields)
        picture, text = described(
            loaded.decision, "\n".join((*loaded.sentences, running_host.engine_sentence(loaded.model, loaded.is_capped)))
        )
        model = watched(loaded.model, loaded.decision.parts[0], loaded.is_capped, cls.hidden.unique_id)
        return io.NodeOutput(model, str(loaded.path), loaded.decision, text, ui=shown(picture, text))
