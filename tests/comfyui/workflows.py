"""The example workflows, with tiny models and sizes in place of theirs, and their API form as the page makes it."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "comfyui_nodes" / "example_workflows"
_TINY = {
    "model.safetensors": "tiny_checkpoint.safetensors",
    "diffusion_models/model.safetensors": "diffusion_models/tiny_flux.safetensors",
    1024: 64,
    20: 2,
}
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def names() -> list[str]:
    """Of the files."""
    return sorted(path.name for path in FOLDER.glob("*.json"))


def tiny(name: str) -> dict[str, object]:
    """A workflow as the page loads it, made small."""
    workflow = json.loads((FOLDER / name).read_text())
    for node in workflow["nodes"]:
        node["widgets_values"] = [_TINY.get(value, value) if not isinstance(value, bool) else value for value in node["widgets_values"]]
    return workflow


def api_form(workflow: dict[str, object], info: dict[str, dict]) -> dict[str, dict]:
    """The workflow as the page queues it.

    Args:
        workflow: as the page loads it.
        info: the host's ``/object_info``.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    made = {}
    for node in workflow["nodes"]:
        inputs: dict[str, object] = {}
        values = iter(node["widgets_values"])
        fields = info[node["type"]]["input"]
        for name, spec in ((name, spec) for group in ("required", "optional") for name, spec in fields.get(group, {}).items()):
            if not isinstance(spec[0], list) and spec[0] not in _WIDGETS:
                continue
            inputs[name] = next(values)
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                next(values)  # what the page does with it afterwards
        assert list(values) == [], (node["type"], "more values than fields")
        inputs |= {one["name"]: sources[one["link"]] for one in node["inputs"] if one["link"] is not None}
        made[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return made
