"""With the host and with other people's nodes, not against them: the same latents bit for bit, and the host as it was."""

from __future__ import annotations

import json
import time

import host_server
import pytest
from graphs import FILE, sampled

pytestmark = pytest.mark.comfyui

_LORA = {"lora_name": "tiny_lora.safetensors", "strength_model": 0.8}


def _same(one, other):
    import torch

    return torch.equal(one, other)


def _between(graph, *steps):
    """Put nodes between the loader and the sampler, the first one next to the loader; OverflowMLOptimize stands for ours."""
    sizes = {"width": 128, "height": 128, "frames": 0, "batch": 1, "steps": 3}
    source = ["1", 0]
    for index, (kind, inputs) in enumerate(steps):
        fields = {"budget": "12MB", "reserve": "", **sizes, **inputs} if kind == "OverflowMLOptimize" else inputs
        graph[f"2{index}"] = {"class_type": kind, "inputs": {"model": source, **fields}}
        source = [f"2{index}", 0]
    graph["5"]["inputs"]["model"] = source
    return graph


def _graph(name, *steps, seed=11):
    return _between(sampled(seed=seed, name=name), *steps)


OURS = ("OverflowMLOptimize", {})
LORA = ("LoraLoaderModelOnly", _LORA)
OTHERS = ("PatchedModel", {})


@pytest.fixture
def unchanged(host):
    """The host's functions and numbers are after the test what they were before, and none is ours."""
    host.run(sampled(name="first"))  # the host imports and fills some things on first use
    before = host.get("/tests/host")
    yield
    after = host.get("/tests/host")
    assert after["foreign"] == []
    assert {key: value for key, value in after["found"].items() if before["found"].get(key, value) != value} == {}


@pytest.mark.parametrize("other", [LORA, OTHERS], ids=["lora", "patched by a pack"])
def test_before_and_after_the_nodes_of_others_latents_are_the_same(host, unchanged, other):
    alone = host.latent(host.run(_graph("alone", other)))
    plain = host.latent(host.run(_graph("plain")))

    assert not _same(alone, plain)  # the other node does something
    assert _same(alone, host.latent(host.run(_graph("after", other, OURS))))
    assert _same(alone, host.latent(host.run(_graph("before", OURS, other))))
    assert _same(plain, host.latent(host.run(_graph("none", OURS))))


def test_what_others_hung_on_a_model_stays_and_ours_is_on_our_clone_alone(host, unchanged):
    ended = host.run(_graph("looked", OTHERS, ("LookAtModel", {"look": 1}), OURS, ("LookAtModel", {"look": 2})))
    before, after = (json.loads(ended["outputs"][node]["text"][0]) for node in ("21", "23"))
    again = json.loads(host.run(_graph("looked", OTHERS, ("LookAtModel", {"look": 3}), seed=12))["outputs"]["21"]["text"][0])

    assert before == again
    ours = {kind: sorted(set(keys) - set(before["wrappers"].get(kind, ()))) for kind, keys in after["wrappers"].items()}
    assert {kind for kind, keys in ours.items() if keys} == {"prepare_sampling", "sampler_sample", "predict_noise", "apply_model"}
    assert all(keys in ([], ["overflowml"]) for keys in ours.values())
    for kind, keys in before["wrappers"].items():
        assert set(keys) <= set(after["wrappers"][kind])
    assert {key: value for key, value in after.items() if key != "wrappers"} == {
        key: value for key, value in before.items() if key != "wrappers"
    }
    assert after["hooked"] == []


def test_two_models_in_one_graph_are_planned_each_for_itself(host, unchanged):
    def both(name, with_ours):
        graph = _graph(name, OURS) if with_ours else _graph(name)
        graph["31"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "other_flux.safetensors", "weight_dtype": "default"}}
        graph["32"] = {
            "class_type": "OverflowMLOptimize",
            "inputs": {**_graph("", OURS)["20"]["inputs"], "model": ["31", 0], "budget": "11MB"},
        }
        graph["35"] = {"class_type": "KSampler", "inputs": {**graph["5"]["inputs"], "model": ["32" if with_ours else "31", 0]}}
        graph["35"]["inputs"]["latent_image"] = ["5", 0]
        graph["36"] = {"class_type": "SaveLatent", "inputs": {"samples": ["35", 0], "filename_prefix": f"{name}-second"}}
        if not with_ours:
            del graph["32"]
        return host.run(graph)

    plain, ended = both("two-plain", False), both("two", True)

    assert _same(host.latent(plain), host.latent(ended))
    assert _same(host.latent(plain, "36"), host.latent(ended, "36"))
    budgets = [ended["outputs"][node]["overflowml"][0]["parts"][0]["budget_bytes"] for node in ("20", "32")]
    assert budgets == [12 * 10**6, 11 * 10**6]


def test_a_cancelled_sampling_leaves_the_host_as_it_was_and_the_next_one_is_right(host, unchanged):
    plain = host.latent(host.run(_graph("wanted", seed=13)))
    kept = host.base / "cache" / "comfyui" / "measurements.json"
    host.run(_graph("warm", OURS, seed=14))
    before = kept.read_text()
    long = _graph("cancelled", OURS, seed=15)
    long["5"]["inputs"]["steps"] = 5000
    began_s, queued = time.monotonic(), host.queue(long)
    time.sleep(1.5)
    host.post("/interrupt", {})
    ended = host.wait(queued)

    assert ended["status"]["status_str"] == "error"
    assert any(event == "execution_interrupted" for event, _ in ended["status"]["messages"])
    assert time.monotonic() - began_s < 30
    assert kept.read_text() == before  # a run that was cancelled teaches nothing
    assert host.get("/tests/memory")["reserve"] == 400 * 2**20
    assert _same(plain, host.latent(host.run(_graph("good", OURS, seed=13))))


def test_unloaded_models_are_gone_and_a_reload_gives_the_same(host, unchanged):
    first = host.latent(host.run(_graph("loaded", OURS, seed=16)))
    assert host.get("/tests/memory")["alive"] >= 1
    host.post("/free", {"unload_models": True, "free_memory": True})
    until = time.monotonic() + 20
    while host.get("/tests/memory")["alive"] and time.monotonic() < until:
        time.sleep(0.2)
    memory = host.get("/tests/memory")

    assert memory["alive"] == 0  # nothing of ours holds it
    assert memory["loaded"] == []
    assert _same(first, host.latent(host.run(_graph("again", OURS, seed=16))))


@pytest.mark.parametrize("is_around", [True, False], ids=["around", "after"])
def test_a_compiled_model_samples_the_same(host, unchanged, is_around):
    compiled = ("TorchCompileModel", {"backend": "cudagraphs"})  # traces as inductor does, and calls no C compiler, which takes minutes
    alone = host.latent(host.run(_graph("compiled", compiled, seed=17)))
    steps = (OURS, compiled, OURS) if is_around else (compiled, OURS)

    assert _same(alone, host.latent(host.run(_graph("both", *steps, seed=17))))


@pytest.mark.parametrize("kind", ["object", "no module"])
def test_what_is_no_model_is_refused_in_one_sentence(host, unchanged, kind):
    graph = _graph("odd", OURS)
    graph["1"] = {"class_type": "OddModel", "inputs": {"kind": kind}}
    message = host_server.error_of(host.run(graph))

    assert message.startswith("a MODEL of class ")
    assert len(message.splitlines()) == 1
    assert host.run(_graph("after-odd", OURS))["status"]["status_str"] == "success"


def test_a_model_of_an_unknown_class_is_planned_by_its_weights_and_says_what_it_does_not_know(host, unchanged):
    look = {"class_type": "PreviewAny", "inputs": {"source": ["20", 4]}}
    graph = _graph("unknown", OURS)
    graph = {
        "1": {"class_type": "OddModel", "inputs": {"kind": "unknown module"}},
        "20": {**graph["20"], "inputs": {**graph["20"]["inputs"], "budget": "2MB"}},
        "9": look,
    }
    ended = host.run(graph)

    assert ended["status"]["status_str"] == "success", ended["status"]
    text = ended["outputs"]["20"]["text"][0]
    assert "step: not predicted" in text
    assert ended["outputs"]["20"]["overflowml"][0]["parts"][0]["plan_fingerprint"]


def test_a_budget_larger_than_the_machine_is_said_and_not_refused(host, unchanged):
    ended = host.run(_graph("large", ("OverflowMLOptimize", {"budget": "9000GB"})))

    assert ended["status"]["status_str"] == "success", ended["status"]
    shown = ended["outputs"]["20"]["overflowml"][0]["parts"][0]
    assert shown["budget_bytes"] <= 9000 * 10**9
    assert "9000" in ended["outputs"]["20"]["text"][0] or shown["budget_bytes"] < 9000 * 10**9


@pytest.mark.parametrize("width", [float("nan"), "NaN", -1, 1.5, [], None])
def test_sizes_that_are_no_counts_end_before_anything_is_loaded(host, unchanged, width):
    graph = _graph("sizes", ("OverflowMLOptimize", {"width": width}))
    answer = host.post("/prompt", {"prompt": graph})
    if "prompt_id" in answer:
        ended = host.wait(answer["prompt_id"])
        if ended["status"]["status_str"] == "error":
            message = host_server.error_of(ended)
            assert "width" in message
            assert len(message.splitlines()) == 1
    else:  # the host's own check
        assert answer["node_errors"]["20"]["errors"]
    assert host.run(_graph("after-sizes", OURS))["status"]["status_str"] == "success"


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"\xff" * 64], ids=["empty", "header cut", "noise"])
def test_a_truncated_file_is_named_by_the_preview(host, unchanged, content):
    path = host.base / "models" / "diffusion_models" / "broken.safetensors"
    path.write_bytes(content)
    try:
        sizes = {"width": 64, "height": 64, "frames": 0, "batch": 1, "steps": 2}
        inputs = {"file": "diffusion_models/broken.safetensors", "budget": f"{len(content) + 9}MB", "reserve": "", **sizes}
        host.get("/object_info")
        message = host_server.error_of(host.run({"1": {"class_type": "OverflowMLPlanPreview", "inputs": inputs}}))
    finally:
        path.unlink()

    assert "broken.safetensors" in message
    assert len(message.splitlines()) == 1
    assert FILE not in message
