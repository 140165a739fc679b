"""Load & Quantize in the real ComfyUI, on the CPU: files that the host loads without us, with the bytes of the plan.

Needs a checkout of the host, COMFYUI_PATH, and an interpreter with its requirements, COMFYUI_PYTHON; docs/comfyui.md tells how.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import host_server
import pytest
from graphs import FILE, sampled

pytestmark = pytest.mark.comfyui

_FORMATS = ("int8", "fp8")


def _checkout():
    return Path(os.environ["COMFYUI_PATH"])


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    running = host_server.start(_checkout(), tmp_path_factory.mktemp("host") / "base")
    yield running
    running.stop()


def _graph(file=f"diffusion_models/{FILE}", seed=1, name="quantized", **fields):
    graph = sampled(seed=seed, name=name)
    sizes = {"width": 128, "height": 128, "frames": 0, "batch": 1, "steps": 3}
    inputs = {"file": file, "format": "int8", "quality": "minimal", "budget": "", "reserve": "", **sizes, **fields}
    graph["1"] = {"class_type": "OverflowMLLoadAndQuantize", "inputs": inputs}
    return graph


def _latent(host, ended):
    from safetensors.torch import load_file

    assert ended["status"]["status_str"] == "success", ended["status"]
    return load_file(host.base / "output" / ended["outputs"]["6"]["latents"][0]["filename"])["latent_tensor"]


def _error(ended):
    assert ended["status"]["status_str"] == "error"
    message = next(values for event, values in ended["status"]["messages"] if event == "execution_error")["exception_message"].strip()
    assert len(message.splitlines()) == 1
    return message


def _models(host):
    return sorted(path.name for path in (host.base / "models" / "diffusion_models").iterdir())


def _made(host, format):
    (found,) = (host.base / "models" / "diffusion_models").glob(f"tiny_flux-{format}-*.safetensors")
    return found


@pytest.fixture(scope="module")
def quantized(host):
    """Latents by format, of files that were made in this run; the shown values; and those of the model as it is."""
    found = {}
    for format in _FORMATS:
        ended = host.run(_graph(format=format, name=format))
        found[format] = (_latent(host, ended), ended["outputs"]["1"])
    return {"plain": (_latent(host, host.run(sampled(name="plain"))), {}), **found}


def test_files_have_the_bytes_of_the_plan_and_results_are_close(host, quantized):
    from safetensors import safe_open

    plain = quantized["plain"][0]
    for format, most in (("int8", 0.05), ("fp8", 0.15)):
        latent, shown = quantized[format]
        path = _made(host, format)
        assert f"file {path.name}: {path.stat().st_size} bytes, {path.stat().st_size} planned; made in this run" in shown["text"][0]
        part = shown["overflowml"][0]["parts"][0]
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            marks = [name for name in names if name.endswith(".comfy_quant")]
            held = sum(-(-file.get_tensor(name).nbytes // 512) * 512 for name in names if name not in marks)
        assert len(marks) == 32  # all linear layers of 2 double and 4 single blocks, and none outside
        assert held == part["resident_bytes"] + part["fixed_bytes"]
        lost = (latent - plain).square().mean().sqrt() / plain.square().mean().sqrt()
        assert 0 < float(lost) < most, (format, float(lost))
        largest = (latent - plain).abs().max() / plain.square().mean().sqrt()
        print(f"{format}: {path.stat().st_size} bytes, rms {float(lost):.4f}, largest {float(largest):.4f} of the latents' rms")  # noqa: T201


def test_what_a_made_file_says_of_itself(host, quantized):
    raw = _made(host, "fp8").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    record = json.loads(header["__metadata__"]["overflowml"])

    assert record["made_by"].startswith("comfy-kitchen ")
    assert record["plan"] == quantized["fp8"][1]["overflowml"][0]["parts"][0]["plan_fingerprint"]
    assert int(header["__metadata__"]["overflowml_crc32"], 16) > 0


def test_the_host_loads_and_samples_them_without_us_with_the_same_bits(host, quantized, tmp_path):
    import torch

    alone = host_server.start(_checkout(), tmp_path / "base", with_package=False, with_pack=False)
    try:
        assert not any(name.startswith("OverflowML") for name in alone.get("/object_info"))
        for format in _FORMATS:
            made = _made(host, format)
            (alone.base / "models" / "diffusion_models" / made.name).symlink_to(made)
            graph = sampled(name=format)
            graph["1"]["inputs"]["unet_name"] = made.name
            assert torch.equal(_latent(alone, alone.run(graph)), quantized[format][0])
        assert "Found quantization metadata" in alone.log
        assert "overflowml" not in alone.log.lower()
        assert not [
            line for line in alone.log.splitlines() if "unet missing" in line or "unet unexpected" in line or "left over keys" in line
        ]
    finally:
        alone.stop()


def test_a_second_run_quantizes_nothing_and_a_changed_source_is_made_anew(host, quantized):
    import torch

    made = _made(host, "int8")
    before_ns, inode = made.stat().st_mtime_ns, made.stat().st_ino
    ended = host.run(_graph(format="int8", budget="30MB", name="again"))
    assert "loaded from the file that an earlier run made" in ended["outputs"]["1"]["text"][0]
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == (before_ns, inode)
    assert torch.equal(_latent(host, ended), quantized["int8"][0])

    source = host.base / "models" / "diffusion_models" / FILE
    content, state = source.read_bytes(), source.stat()
    try:
        source.write_bytes(content[:-4096] + bytes(4096))  # other weights, the same shapes; the node's fields are the same
        os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))  # even with the old time
        again = host.run(_graph(format="int8", budget="30MB", name="changed"))
        assert "made in this run" in again["outputs"]["1"]["text"][0]
        assert made.stat().st_ino != inode
    finally:
        source.write_bytes(content)
    assert torch.equal(_latent(host, host.run(_graph(format="int8", name="back"))), quantized["int8"][0])


def test_other_nodes_work_on_it_and_other_branches_keep_their_weights(host, quantized):
    import torch

    graph = _graph(format="int8", name="both")
    graph["11"] = sampled()["1"]
    graph["15"] = {**graph["5"], "inputs": {**graph["5"]["inputs"], "model": ["11", 0]}}
    graph["16"] = {"class_type": "SaveLatent", "inputs": {"samples": ["15", 0], "filename_prefix": "branch"}}
    sizes = {"width": 128, "height": 128, "frames": 0, "batch": 1, "steps": 3, "budget": "", "reserve": ""}
    graph["2"] = {"class_type": "OverflowMLOptimize", "inputs": {"model": ["1", 0], **sizes}}
    graph["5"]["inputs"]["model"] = ["2", 0]
    graph["7"] = {"class_type": "OverflowMLBudgetCheck", "inputs": {"value": ["4", 0], "plan": ["1", 2], "budget": "1GB"}}
    graph["5"]["inputs"]["latent_image"] = ["7", 0]
    ended = host.run(graph)

    from safetensors.torch import load_file

    branch = load_file(host.base / "output" / ended["outputs"]["16"]["latents"][0]["filename"])["latent_tensor"]
    assert torch.equal(_latent(host, ended), quantized["int8"][0])
    assert torch.equal(branch, quantized["plain"][0])


def test_auto_loads_the_file_itself_where_it_fits(host, quantized):
    import torch

    ended = host.run(_graph(format="auto", name="auto"))

    assert "weights as they are stored" in ended["outputs"]["1"]["text"][0]
    assert torch.equal(_latent(host, ended), quantized["plain"][0])


def test_auto_quantizes_where_the_budget_asks_for_it(host, quantized):
    ended = host.run(_graph(format="auto", budget="10MB", name="tight"))

    assert "32 layers in int8" in ended["outputs"]["1"]["text"][0]
    assert ended["outputs"]["1"]["overflowml"][0]["verdict"] == "fits"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": "0GB"}, "budget='0GB'"),
        ({"budget": "1MB"}, "needs at least"),
        ({"format": "nvfp4"}, "has no arithmetic for it"),
        ({"format": "mxfp8"}, "choose int8 or fp8"),
    ],
)
def test_bad_fields_are_one_sentence_and_leave_nothing(host, quantized, fields, words):
    before = _models(host)

    assert words in _error(host.run(_graph(**fields)))
    assert _models(host) == before
    assert host.run(sampled(name="after"))["status"]["status_str"] == "success"


def _refused(host, graph):
    """What the host says of a graph that it does not queue."""
    answer = host.post("/prompt", {"prompt": graph})
    (error,) = answer["node_errors"]["1"]["errors"][:1]
    return error["details"]


def test_bad_files_are_refused_before_the_queue_in_one_sentence(host, quantized):
    folder = host.base / "models" / "diffusion_models"
    whole = (folder / FILE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    bad = {
        "cut.safetensors": (whole[:-1], "cut short"),
        "header.safetensors": (whole[: 8 + length], "cut short"),
        "old.ckpt": (b"PK", "pickle"),
        "other.gguf": (b"GGUF", "quantized already"),
    }
    try:
        for name, (content, words) in bad.items():
            (folder / name).write_bytes(content)
            assert words in _refused(host, _graph(f"diffusion_models/{name}"))
        assert "quantized already" in _refused(host, _graph(f"diffusion_models/{_made(host, 'int8').name}"))
        assert "choose another one" in _refused(host, _graph("diffusion_models/../../etc/passwd.safetensors"))
        assert "not one of auto, int8" in _refused(host, _graph(format="int3"))
    finally:
        for name in bad:
            (folder / name).unlink(missing_ok=True)


def test_an_unknown_architecture_is_one_sentence(host, quantized):
    import torch
    from safetensors.torch import save_file

    folder = host.base / "models" / "diffusion_models"
    save_file({f"layers.{i}.lin.weight": torch.ones(64, 64) for i in range(4)}, str(folder / "unknown.safetensors"))
    try:
        assert "ComfyUI does not know its architecture" in _error(host.run(_graph("diffusion_models/unknown.safetensors")))
    finally:
        (folder / "unknown.safetensors").unlink()


def test_the_page_hears_before_the_run_what_the_node_plans(host, quantized):
    graph = _graph(format="fp8", budget="12MB", seed=9, name="told")
    listen = [host_server.interpreter(), str(Path(__file__).parent / "listen.py"), host.url.removeprefix("http://")]
    environment = host_server.environment(host.base)
    done = subprocess.run(listen, input=json.dumps(graph), env=environment, capture_output=True, text=True, timeout=120, check=True)
    (verdict,) = [event["data"] for event in map(json.loads, done.stdout.splitlines()) if event["type"] == "overflowml.verdict"]

    measured = [event["data"] for event in map(json.loads, done.stdout.splitlines()) if event["type"] == "overflowml.measured"]

    assert [(one["node"], one["parts"][0]["key"]) for one in measured] == [("1", verdict["parts"][0]["key"])]
    assert verdict["parts"][0]["plan_fingerprint"] == _record(host, "fp8", "12MB")["plan_fingerprint"]
    assert verdict["verdict"] == "fits"


def _record(host, format, budget):
    """What the node shows for a budget."""
    return host.run(_graph(format=format, budget=budget, name="shown"))["outputs"]["1"]["overflowml"][0]["parts"][0]


def test_a_checkpoints_diffusion_model_is_taken_out_of_it(host, quantized):
    import torch
    from safetensors.torch import load_file, save_file

    folder = host.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    weights = load_file(host.base / "models" / "diffusion_models" / FILE)
    whole = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
    save_file({**whole, "first_stage_model.decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}, str(folder / "whole.safetensors"))
    ended = host.run(_graph("checkpoints/whole.safetensors", format="fp8", name="checkpoint"))

    (made,) = (host.base / "models" / "diffusion_models").glob("whole-fp8-*.safetensors")
    assert made.stat().st_size == _made(host, "fp8").stat().st_size
    assert torch.equal(_latent(host, ended), quantized["fp8"][0])
    as_stored = host.run(_graph("checkpoints/whole.safetensors", format="auto", name="checkpoint"))
    assert torch.equal(_latent(host, as_stored), quantized["plain"][0])


def test_a_model_of_it_can_be_copied_reloaded_and_patched_like_the_hosts_own(host, quantized):
    script = Path(__file__).parent / "check_quantized.py"
    said = host_server.run_script(_checkout(), host.base, script, str(_made(host, "int8")), str(host.base))

    assert "patched, copied and loaded again" in said
