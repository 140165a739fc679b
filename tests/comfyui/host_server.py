"""The real host as a process: started in a folder of its own, spoken to over HTTP, its log at hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
_READY_S = 240.0
_RUN_S = 120.0


def interpreter() -> str:
    """The host's interpreter: COMFYUI_PYTHON, else the one that runs the tests."""
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


@dataclass
class Host:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    base: Path

    @property
    def url(self) -> str:
        """Where its page is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything that it wrote so far."""
        return (self.base / "host.log").read_text(errors="replace")

    def get(self, path: str) -> object:
        """A JSON answer."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, value: object) -> object:
        """A JSON answer to a JSON value; an error answer is one, too."""
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(value).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def run(self, prompt: dict[str, object], pause_s: float = 0.05) -> dict[str, object]:
        """Queue a graph in API form and wait for its history, looking for it every ``pause_s`` seconds."""
        return self.wait(self.queue(prompt), pause_s)

    def queue(self, prompt: dict[str, object]) -> str:
        """Queue a graph in API form."""
        queued = self.post("/prompt", {"prompt": prompt})
        assert "prompt_id" in queued, queued
        return queued["prompt_id"]

    def wait(self, prompt_id: str, pause_s: float = 0.05) -> dict[str, object]:
        """A graph's history, which may come a moment after the event that tells of its end."""
        until = time.monotonic() + _RUN_S
        while time.monotonic() < until:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id]["status"]["completed"] is not None:
                return history[prompt_id]
            time.sleep(pause_s)
        raise AssertionError(f"the graph did not end within {_RUN_S} s; the host says:\n{self.log[-3000:]}")

    def latent(self, ended: dict[str, object], node: str = "6") -> torch.Tensor:
        """What a SaveLatent node of a graph kept."""
        from safetensors.torch import load_file

        assert ended["status"]["status_str"] == "success", ended["status"]
        return load_file(self.base / "output" / ended["outputs"][node]["latents"][0]["filename"])["latent_tensor"]

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment(base: Path, with_package: bool = True) -> dict[str, str]:
    """The host's environment: our packages reachable, or hidden; a cache folder of its own; the proxy left out."""
    made = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and name != "PYTHONPATH"}
    made.update(OMP_NUM_THREADS="1", MKL_CBWR="AUTO,STRICT", OVERFLOWML_CACHE=str(base / "cache"))
    if with_package:
        made["PYTHONPATH"] = os.pathsep.join((str(CHECKOUT), str(CHECKOUT / "plugins")))
    return made


def error_of(ended: dict[str, object]) -> str:
    """What a graph that failed shows in the page."""
    assert ended["status"]["status_str"] == "error", ended["status"]
    return next(values for event, values in ended["status"]["messages"] if event == "execution_error")["exception_message"].strip()


def start(comfyui: Path, base: Path, *arguments: str, with_package: bool = True, with_pack: bool = True, card_bytes: int = 0) -> Host:
    """Start the host on the CPU with our pack and a tiny model, and wait until it answers.

    Args:
        comfyui: a checkout of the host.
        base: an empty folder for its models, packs and outputs.
        arguments: further ones of the host's.
        with_package: whether its interpreter may see overflowml.
        with_pack: whether our nodes are among its packs.
        card_bytes: have it believe that the CPU is a card with so much memory.
    """
    packs = base / "custom_nodes"
    packs.mkdir(parents=True)
    for folder in ("input", "output", "temp", "user"):
        (base / folder).mkdir()
    if with_pack:
        (packs / "ComfyUI-OverflowML").symlink_to(CHECKOUT / "comfyui_nodes", target_is_directory=True)
    (packs / "other_pack").symlink_to(HERE / "other_pack", target_is_directory=True)
    launch = [interpreter(), str(HERE / "launch.py"), str(comfyui)]
    made = environment(base, with_package)
    run_script(comfyui, base, HERE / "make_models.py", str(base / "models"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if card_bytes:
        made["OVERFLOWML_TEST_CARD"] = str(card_bytes)
    device = [] if card_bytes else ["--cpu"]
    flags = [*device, "--base-directory", str(base), "--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--port", str(port)]
    with (base / "host.log").open("wb") as log:
        process = subprocess.Popen([*launch, *flags, *arguments], env=made, stdout=log, stderr=subprocess.STDOUT)
    host = Host(process, port, base)
    until = time.monotonic() + _READY_S
    while time.monotonic() < until and process.poll() is None:
        try:
            host.get("/prompt")
        except OSError:
            time.sleep(0.3)
        else:
            return host
    host.stop()
    raise AssertionError(f"the host did not start:\n{host.log[-3000:]}")


def run_script(comfyui: Path, base: Path, script: Path, *arguments: str) -> str:
    """Run a script of ours with the host's classes and return what it printed."""
    made = {**environment(base), "OVERFLOWML_TEST_SCRIPT": str(script)}
    done = subprocess.run(
        [interpreter(), str(HERE / "launch.py"), str(comfyui), *arguments],
        env=made,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
