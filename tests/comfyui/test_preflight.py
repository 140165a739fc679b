"""The prompt handler: hands requests on at once, and says what it found."""

from __future__ import annotations

import threading

import pytest
from flux_files import flux_shapes, write_header

from overflowml_comfyui.decision import Decision, Part
from overflowml_comfyui.preflight import Preflight, decide_graph
from overflowml_core.facts import Accelerator, Component, HostMemory, Machine, Network, Rates, Workload

GIB = 2**30
_NETWORK = Network((Component("model", "Flux", (), 0, 0, (), "model"),), "a file", "Flux", "f")
_PART = Part("model", None, "no", _NETWORK, Workload())


def _machine():
    card = Accelerator("cuda", "a card", 0, 24 * GIB, 24 * GIB, backend="cuda")
    return Machine((card,), HostMemory(64 * GIB, 48 * GIB, 32 * GIB, 8), Rates(25e9, 25e9, 3e9), 200 * GIB)


def _prompt(file):
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": file}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "latent_image": ["4", 0], "steps": 4}},
    }


def test_a_request_comes_back_before_it_is_decided():
    go, told = threading.Event(), []
    preflight = Preflight(lambda prompt: go.wait(20) and Decision((_PART,)), lambda *heard: told.append(heard))
    request = {"prompt": {}, "client_id": "page"}

    assert preflight(request) is request
    assert told == []
    go.set()
    preflight.wait()
    assert told == [(Decision((_PART,)), "page")]


@pytest.mark.parametrize("request_", [None, [], "text", {}, {"prompt": 7, "client_id": 7}])
def test_any_request_is_handed_on(request_):
    told = []
    preflight = Preflight(lambda prompt: decide_graph(prompt, lambda *_: None, _machine()), lambda *heard: told.append(heard))

    assert preflight(request_) is request_
    preflight.wait()
    assert told == []


def test_a_fault_is_logged_and_later_graphs_are_decided(caplog):
    answers, told = [RuntimeError("odd"), Decision((_PART,))], []

    def decide(_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    preflight = Preflight(decide, lambda *heard: told.append(heard))
    preflight({"prompt": {}})
    preflight({"prompt": {}})
    preflight.wait()
    assert "odd" in caplog.text
    assert len(told) == 1


def test_a_graph_is_decided_by_its_files_headers(tmp_path):
    path = tmp_path / "flux.safetensors"
    write_header(path, flux_shapes(256, 3, 6))
    decision = decide_graph(_prompt("flux.safetensors"), lambda folder, file: path if folder == "diffusion_models" else None, _machine())

    assert [part.verdict for part in decision.parts] == ["fits"]
    assert decision.parts[0].workload == Workload(height=1024, width=1024, steps=4)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_or_missing_file_is_left_to_the_host(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    assert decide_graph(_prompt("bad.safetensors"), lambda *_: path, _machine()).parts == ()
    assert decide_graph(_prompt("gone.safetensors"), lambda *_: None, _machine()).parts == ()
    assert decide_graph(_prompt("gone.safetensors"), lambda *_: tmp_path / "gone.safetensors", _machine()).parts == ()


def test_a_file_that_will_be_quantized_is_planned_by_whoever_knows_the_formats(tmp_path):
    path = tmp_path / "flux.safetensors"
    write_header(path, flux_shapes(256, 3, 6))
    fields = {"file": "checkpoints/flux.safetensors", "format": "int8", "quality": "minimal", "budget": "", "reserve": ""}
    prompt = {**_prompt("x"), "1": {"class_type": "OverflowMLLoadAndQuantize", "inputs": fields}}
    asked = []

    def foresee(label, fields):
        asked.append((label, fields["format"], fields["width"]))
        return _PART

    assert decide_graph(prompt, lambda *_: path, _machine(), foresee=foresee).parts == (_PART,)
    assert asked == [("checkpoints/flux.safetensors", "int8", 1024)]
    assert decide_graph(prompt, lambda *_: path, _machine()).parts == ()
