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

    def run(self, prompt: dict[str, object]) -> dict[str, object]:
        """Queue a graph in API form and wait for its history; the history may come a moment after the event that tells of its end."""
        queued = self.post("/prompt", {"prompt": prompt})
        assert "prompt_id" in queued, queued
        until = time.monotonic() + _RUN_S
        while time.monotonic() < until:
            history = self.get(f"/history/{queued['prompt_id']}")
            if queued["prompt_id"] in history and history[queued["prompt_id"]]["status"]["completed"] is not None:
                return history[queued["prompt_id"]]
            time.sleep(0.05)
        raise AssertionError(f"the graph did not end within {_RUN_S} s; the host says:\n{self.log[-3000:]}")

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


def start(comfyui: Path, base: Path, *arguments: str, with_package: bool = True, with_pack: bool = True) -> Host:
    """Start the host on the CPU with our pack and a tiny model, and wait until it answers.

    Args:
        comfyui: a checkout of the host.
        base: an empty folder for its models, packs and outputs.
        arguments: further ones of the host's.
        with_package: whether its interpreter may see overflowml.
        with_pack: whether our nodes are among its packs.
    """
    packs = base / "custom_nodes"
    packs.mkdir(parents=True)
    for folder in ("input", "output", "temp", "user"):
        (base / folder).mkdir()
    if with_pack:
        (packs / "ComfyUI-OverflowML").symlink_to(CHECKOUT / "comfyui_nodes", target_is_directory=True)
    (packs / "conditioning_pack").symlink_to(HERE / "conditioning_pack", target_is_directory=True)
    launch = [interpreter(), str(HERE / "launch.py"), str(comfyui)]
    made = environment(base, with_package)
    run_script(comfyui, base, HERE / "make_models.py", str(base / "models" / "diffusion_models"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--cpu", "--base-directory", str(base), "--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--port", str(port)]
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
