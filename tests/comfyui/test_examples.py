"""The example workflows in the real host, end to end: as the page makes them, with tiny models in place of the files that they name."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import host_server
import pytest
import workflows

pytestmark = pytest.mark.comfyui

_TRIED = ("optimize_a_checkpoint.json", "preview_a_file.json", "stop_before_it_is_too_large.json")
_NAMES_OTHERS = "load_and_quantize.json"
"""Names text encoders of Flux, of which there are no small ones; what its node makes is sampled in test_load_quantize.py."""


@pytest.mark.parametrize("name", ["optimize_a_checkpoint.json", "stop_before_it_is_too_large.json"])
def test_an_example_makes_its_picture_with_every_part_planned(host, name):
    graph = workflows.api_form(workflows.tiny(name), host.get("/object_info"))
    optimize = next(key for key, node in graph.items() if node["class_type"] == "OverflowMLOptimize")
    graph[optimize]["inputs"]["budget"] = f"{20 + len(name)}GB"  # hosts before 0.33 do not repeat what a cached node showed
    ended = host.run(graph)

    assert ended["status"]["status_str"] == "success", ended["status"]
    pictures = [image for output in ended["outputs"].values() for image in output.get("images", ())]
    assert len(pictures) == 1
    assert (host.base / "output" / pictures[0]["filename"]).stat().st_size > 0
    parts = ended["outputs"][optimize]["overflowml"][0]["parts"]
    assert [part["name"] for part in parts] == ["model", "text encoder", "vae"]
    assert all(part["plan_fingerprint"] and part["peak_bytes"] > 0 for part in parts)


def test_the_example_with_a_check_stops_where_the_plan_is_too_large(host):
    graph = workflows.api_form(workflows.tiny("stop_before_it_is_too_large.json"), host.get("/object_info"))
    check = next(node for node in graph.values() if node["class_type"] == "OverflowMLBudgetCheck")
    check["inputs"]["budget"] = "1MB"
    message = host_server.error_of(host.run(graph))

    assert "more than the budget of" in message
    assert "raise it to" in message
    assert len(message.splitlines()) == 1


def test_the_example_that_previews_says_what_it_says(host):
    graph = workflows.api_form(workflows.tiny("preview_a_file.json"), host.get("/object_info"))
    ended = host.run(graph)

    assert ended["status"]["status_str"] == "success", ended["status"]
    texts = [text for output in ended["outputs"].values() for text in output["text"]]
    assert any("a second" in text for text in texts)
    assert any("tiny_flux.safetensors" in text and "peak" in text for text in texts)


def test_the_example_that_quantizes_is_made_of_what_the_host_has(host):
    graph = workflows.api_form(workflows.tiny(_NAMES_OTHERS), host.get("/object_info"))

    sampled = next(node for node in graph.values() if node["class_type"] == "KSampler")
    assert graph[sampled["inputs"]["model"][0]]["class_type"] == "OverflowMLLoadAndQuantize"


def test_every_example_is_tried_here():
    assert set(workflows.names()) == {*_TRIED, _NAMES_OTHERS}


def test_the_page_queues_the_examples_as_they_are_tried_here(host):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    made = host_server.environment(host.base)
    probe = [host_server.interpreter(), "-c", "import playwright"]
    if browser is None or subprocess.run(probe, env=made, capture_output=True, check=False).returncode:
        pytest.skip("no browser: install chromium, and playwright into the host's interpreter")
    info = host.get("/object_info")
    small = [workflows.tiny(name) for name in _TRIED]
    for workflow in small:  # the host runs nothing twice
        for node in workflow["nodes"]:
            if node["type"] == "KSampler":
                node["widgets_values"][0] = 77
    command = [host_server.interpreter(), str(Path(__file__).parent / "examples_page.py"), host.url, browser]
    done = subprocess.run(command, input=json.dumps(small), env=made, capture_output=True, text=True, timeout=400, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    *ran, faults = [json.loads(line) for line in done.stdout.splitlines()]
    for workflow, one in zip(small, ran, strict=True):
        queued = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in one["prompt"].items()}
        assert queued == workflows.api_form(workflow, info)
        assert one["status"]["status_str"] == "success", one["status"]
    assert [line for line in faults["console"] + faults["missing"] if "verflow" in line] == []
