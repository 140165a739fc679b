"""What a prompt loads, and at which sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overflowml_comfyui.graph import loads_of


def _prompt(**changes):
    nodes = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "OverflowMLOptimize", "inputs": {"model": ["1", 0], "budget": "12GB", "reserve": "", "width": 8}},
        "3": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["2", 0], "lora_name": "l.safetensors"}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1344, "height": 768, "batch_size": 2}},
        "5": {
            "class_type": "KSampler",
            "inputs": {"model": ["3", 0], "latent_image": ["4", 0], "steps": 28, "positive": ["7", 0], "negative": ["7", 0]},
        },
        "6": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "7": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "clip_l.safetensors", "clip_name2": "t5.safetensors"}},
    }
    return {**nodes, **changes}


def test_a_loader_is_found_through_other_nodes_with_its_samplers_sizes_and_budget():
    load = loads_of(_prompt())[0]

    assert (load.folder, load.file) == ("diffusion_models", "flux.safetensors")
    assert load.fields == {"width": 1344, "height": 768, "batch": 2, "steps": 28, "budget": "12GB", "reserve": ""}


def test_loaders_beside_the_sampler_have_its_sizes_and_no_budget():
    others = {load.file: load for load in loads_of(_prompt())[1:]}

    assert set(others) == {"ae.safetensors", "clip_l.safetensors", "t5.safetensors"}
    assert others["ae.safetensors"].fields == {"width": 1344, "height": 768, "batch": 2, "steps": 28}


def test_a_custom_sampler_takes_model_and_steps_from_its_guider_and_scheduler():
    prompt = _prompt(
        **{
            "5": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["8", 0], "sigmas": ["9", 0], "latent_image": ["4", 0]}},
            "8": {"class_type": "BasicGuider", "inputs": {"model": ["3", 0], "conditioning": ["7", 0]}},
            "9": {"class_type": "BasicScheduler", "inputs": {"model": ["3", 0], "steps": 9}},
        }
    )

    assert loads_of(prompt)[0].fields["steps"] == 9


def test_a_video_has_frames():
    latent = {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 832, "height": 480, "length": 81, "batch_size": 1}}

    assert loads_of(_prompt(**{"4": latent}))[0].fields["frames"] == 81


def test_a_size_that_comes_from_another_node_is_left_open():
    latent = {"class_type": "EmptySD3LatentImage", "inputs": {"width": ["10", 0], "height": 768}}

    assert "width" not in loads_of(_prompt(**{"4": latent}))[0].fields


def test_a_circle_of_links_ends():
    prompt = _prompt(**{"3": {"class_type": "A", "inputs": {"model": ["2", 0]}}, "2": {"class_type": "B", "inputs": {"model": ["3", 0]}}})

    assert loads_of(prompt)[0].file == "flux.safetensors"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=12,
)
_keys = st.sampled_from(["model", "guider", "latent_image", "sigmas", "unet_name", "width", "height", "steps", "budget"])
_nodes = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(["UNETLoader", "KSampler", "OverflowMLOptimize"]) | _json,
        "inputs": st.dictionaries(_keys, _json | st.tuples(st.sampled_from("123"), st.integers()).map(list), max_size=6) | _json,
    }
)


@given(st.dictionaries(st.sampled_from("123"), _nodes | _json, max_size=3) | _json)
def test_any_json_is_read_without_an_error(prompt):
    for load in loads_of(prompt):
        assert isinstance(load.file, str)


def test_our_own_loader_names_the_folder_and_what_is_asked_of_it():
    ours = {
        "class_type": "OverflowMLLoadAndQuantize",
        "inputs": {
            "file": "checkpoints/sub/a.safetensors",
            "format": "int8",
            "quality": "minimal",
            "budget": "9GB",
            "reserve": "",
            "width": 8,
        },
    }
    load = loads_of(_prompt(**{"1": ours}))[0]

    assert (load.folder, load.file) == ("checkpoints", "sub/a.safetensors")
    assert load.fields == {
        **{"width": 1344, "height": 768, "batch": 2, "steps": 28},
        **{"budget": "9GB", "reserve": "", "format": "int8", "quality": "minimal"},
    }
    assert [load.file for load in loads_of(_prompt(**{"1": {**ours, "inputs": {"file": 7}}}))] == [
        "ae.safetensors",
        "clip_l.safetensors",
        "t5.safetensors",
    ]
