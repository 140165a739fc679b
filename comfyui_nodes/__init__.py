"""The node pack's entry: what ComfyUI reads when it starts. Without the overflowml package it adds no nodes and says what to install."""

from __future__ import annotations

import importlib.util
import logging

WEB_DIRECTORY = "./web"
NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

if importlib.util.find_spec("overflowml_comfyui") is None:
    logging.getLogger("overflowml").warning(
        "ComfyUI-OverflowML adds no nodes: install it with 'pip install overflowml' and start ComfyUI again"
    )
elif importlib.util.find_spec("comfy_api") is not None:  # not in a test that imports the folder
    from .load_quantize import LoadAndQuantize
    from .nodes import NODES, watch_prompts

    for node in (*NODES, LoadAndQuantize):
        shape = node.define_schema()
        NODE_CLASS_MAPPINGS[shape.node_id], NODE_DISPLAY_NAME_MAPPINGS[shape.node_id] = node, shape.display_name
    watch_prompts()
