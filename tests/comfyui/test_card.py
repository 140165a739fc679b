"""The host's estimating engine at work: it believes that its CPU is a card, loads a part of the weights and streams the rest.

Started with ``--lowvram`` and with ``--novram``, a server for each.
"""

from __future__ import annotations

import os
from pathlib import Path

import host_server
import pytest
from graphs import sampled

pytestmark = pytest.mark.comfyui

_CARD_BYTES = 4 * 2**30
_MODEL_BYTES = 9_200_000
_LORA = {"lora_name": "tiny_lora.safetensors", "strength_model": 0.8}


@pytest.fixture(scope="module", params=["--lowvram", "--novram"])
def card(request, tmp_path_factory):
    checkout = Path(os.environ["COMFYUI_PATH"])
    running = host_server.start(checkout, tmp_path_factory.mktemp("card") / "base", request.param, card_bytes=_CARD_BYTES)
    running.flag = request.param
    yield running
    running.stop()


def _loaded(card):
    return card.get("/tests/memory")["loaded"]


def _fresh(card):
    """What is loaded stays as it is: a plan speaks to the next load."""
    card.post("/free", {"unload_models": True, "free_memory": True})


def _with_lora(graph):
    graph["7"] = {"class_type": "LoraLoaderModelOnly", "inputs": {**_LORA, "model": graph["2" if "2" in graph else "5"]["inputs"]["model"]}}
    graph["2" if "2" in graph else "5"]["inputs"]["model"] = ["7", 0]
    return graph


def test_under_the_flag_latents_are_the_same_and_the_budget_is_kept(card):
    import torch

    plain = card.latent(card.run(sampled(name="plain")))
    whole = _loaded(card)
    _fresh(card)
    ended = card.run(sampled({"budget": "8MB"}, name="ours"))
    part = _loaded(card)
    reserve = card.get("/tests/memory")["reserve"]

    assert torch.equal(plain, card.latent(ended))
    assert reserve == 400 * 2**20
    assert ended["outputs"]["2"]["overflowml"][0]["verdict"] == "fits slower"
    if card.flag == "--novram":
        assert max(whole + part) < _MODEL_BYTES // 4  # what cannot be streamed
    else:
        assert whole[0] > _MODEL_BYTES
        assert part[0] < 8 * 10**6


def test_a_lora_is_applied_alike_to_what_stays_and_what_is_streamed(card):
    import torch

    _fresh(card)
    plain = card.latent(card.run(_with_lora(sampled(seed=2, name="lora"))))
    _fresh(card)

    assert torch.equal(plain, card.latent(card.run(_with_lora(sampled({"budget": "8MB"}, seed=2, name="lora-ours")))))
