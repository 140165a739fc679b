"""Judges what is installed: Python, torch and its build, the hosts, and what they need."""

from __future__ import annotations

import re
from collections.abc import Iterator

from overflowml_core.doctor.facts import Facts, built_backends
from overflowml_core.doctor.report import Check
from overflowml_core.inspect.driver import DriverDevice
from overflowml_core.inspect.torch_build import TorchBuild

RUN_WITH: dict[str, tuple[str, str]] = {
    "torch": ("2.6", "2.13"),
    "diffusers": ("0.41", "0.42"),
    "transformers": ("5.17", "5.23"),
    "accelerate": ("1.10", "1.15"),
    "torchao": ("0.14", "0.18"),
}
"""First release that this version of the project takes (its own requirements), and last one that its tests ran with."""

LEAST_DRIVERS = {11: ((450, 80), (452, 39)), 12: ((525, 60), (528, 33)), 13: ((580,), (580,))}
"""Oldest driver (Linux, Windows) that runs programs built with any CUDA of a major version (CUDA release notes, table of minor version
compatibility). Newer drivers run them all."""

FIRST_CUDA = (((12, 0), (12, 8)), ((10, 0), (12, 8)), ((9, 0), (11, 8)), ((8, 9), (11, 8)), ((8, 0), (11, 0)))
"""(compute capability from, CUDA from): what a toolkit must be to compile for a device (CUDA release notes)."""
OLDEST_CAPABILITY = {13: (7, 5), 12: (5, 0)}
"""Compute capability below which a major version of CUDA compiles nothing (CUDA release notes, "deprecated and dropped features")."""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of "2.13.0+cu128"; empty where it begins with none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part[:9]) for part in match[0].split(".")) if match else ()


def check_python(facts: Facts) -> Iterator[Check]:
    """The interpreter."""
    if numbers(facts.python) < (3, 10):
        yield Check(
            "python", "FAIL", f"Python {facts.python} is too old: 3.10 is the oldest that is supported", "install Python 3.10 or newer"
        )
    else:
        yield Check("python", "PASS", f"Python {facts.python}")


def check_torch(facts: Facts) -> Iterator[Check]:
    """torch is there, recent enough, and built for the devices that there are."""
    torch = facts.torch
    if torch is None:
        yield Check("torch", "FAIL", "torch is not installed: sizes can be planned, nothing can run", 'pip install "overflowml[diffusers]"')
        return
    version = torch.version or facts.versions.get("torch", "")
    shown = f"torch {version} ({_built_for(facts)})"
    if version and numbers(version) < numbers(RUN_WITH["torch"][0]):
        fix = f'pip install --upgrade "torch>={RUN_WITH["torch"][0]}"'
        yield Check("torch", "FAIL", f"{shown} is too old: {RUN_WITH['torch'][0]} is the oldest that is supported", fix)
        return
    yield _newer("torch", version, shown)
    if torch.known:
        yield from _check_build(facts)


def _built_for(facts: Facts) -> str:
    torch = facts.torch
    if torch is None or not torch.known:
        return "unknown build"
    for name, version in (("CUDA", torch.cuda), ("ROCm", torch.hip), ("XPU", torch.xpu)):
        if version:
            return f"{name} {version}"
    return "MPS" if any(device.backend == "mps" for device in facts.devices) else "CPU only"


def _check_build(facts: Facts) -> Iterator[Check]:
    torch = facts.torch or TorchBuild()
    for backend, name, built in (("cuda", "NVIDIA", torch.cuda), ("rocm", "AMD", torch.hip), ("xpu", "Intel", torch.xpu)):
        device = next((d for d in facts.devices if d.backend == backend), None)
        if device is None or built:
            continue
        if torch.cuda or torch.hip or torch.xpu:
            # Built for the other card of two: a laptop's integrated one is no loss.
            if any(d.backend in built_backends(facts) for d in facts.devices):
                continue
            yield Check(
                "torch-build", "FAIL", f"{device.name} is there, and torch is built for {_built_for(facts)}", _other_build(facts, name)
            )
        elif backend == "cuda" or not device.unified:
            yield Check("torch-build", "FAIL", f"{device.name} is there, and torch is built for the CPU only", _other_build(facts, name))
    if torch.cuda and facts.nvidia:
        yield _check_driver(facts, facts.nvidia[0])
        yield from (check for device in facts.nvidia if (check := _check_capability(facts, torch.cuda, device)) is not None)


def _other_build(facts: Facts, vendor: str) -> str:
    if vendor == "NVIDIA" and "linux" in facts.machine.environment and facts.architecture == "x86_64":
        # There the build without a suffix is the one for CUDA; without the flags pip would keep the one that is installed.
        return "pip install --upgrade --force-reinstall torch"
    selector = {"NVIDIA": "CUDA", "AMD": "ROCm", "Intel": "XPU"}[vendor]
    return f"pip uninstall torch, then run the command that PyTorch's page 'Get started' gives for pip and {selector}"


def _check_driver(facts: Facts, device: DriverDevice) -> Check:
    cuda = facts.torch.cuda if facts.torch is not None else ""
    major = numbers(cuda)[:1]
    least = LEAST_DRIVERS.get(major[0]) if major else None
    driver = numbers(device.driver)
    if least is None or not driver:
        return Check("torch-driver", "PASS", f"driver {device.driver or 'of unknown version'}, torch built with CUDA {cuda}")
    wanted = least[1] if "windows" in facts.machine.environment else least[0]
    if driver < wanted:
        needed = ".".join(map(str, wanted))
        text = f"driver {device.driver} is too old for torch built with CUDA {cuda}: it needs {needed} or newer"
        return Check("torch-driver", "FAIL", text, f"install NVIDIA driver {needed} or newer, or a torch that is built with an older CUDA")
    return Check("torch-driver", "PASS", f"driver {device.driver} runs CUDA {cuda}")


def _check_capability(facts: Facts, cuda: str, device: DriverDevice) -> Check | None:
    capability, built = numbers(device.capability), numbers(cuda)
    if len(capability) != 2 or not built:
        return None
    for since, first in FIRST_CUDA:
        if capability >= since:
            if built[:2] < first:
                needed = ".".join(map(str, first))
                text = f"{device.name} (compute capability {device.capability}) needs a torch built with CUDA {needed}, this one has {cuda}"
                return Check("torch-device", "FAIL", text, _other_build(facts, "NVIDIA"))
            break
    oldest = OLDEST_CAPABILITY.get(built[0])
    if oldest is not None and capability < oldest:
        text = f"{device.name} (compute capability {device.capability}) is not supported any more by CUDA {built[0]}"
        return Check("torch-device", "FAIL", text, f"run the command that PyTorch's page 'Previous versions' gives for CUDA {built[0] - 1}")
    return None


def check_hosts(facts: Facts) -> Iterator[Check]:
    """The hosts, and what both of them load through."""
    there = [name for name in ("diffusers", "transformers") if name in facts.versions]
    if not there:
        text = "neither diffusers nor transformers is installed: plans work, nothing can be loaded"
        yield Check("hosts", "WARN", text, 'pip install "overflowml[diffusers]" (or "overflowml[transformers]")')
        return
    for name in there:
        yield _version_check(facts, name, "FAIL")
    if "accelerate" not in facts.versions:
        text = "accelerate is not installed: the hosts load nothing onto a device without it"
        yield Check("accelerate", "FAIL", text, f'pip install "accelerate>={RUN_WITH["accelerate"][0]}"')
    else:
        yield _version_check(facts, "accelerate", "FAIL")
    if "safetensors" not in facts.versions:
        yield Check("safetensors", "FAIL", "safetensors is not installed", "pip install safetensors")


def check_torchao(facts: Facts) -> Iterator[Check]:
    """What converts weights."""
    if facts.torch is None:
        return
    if "torchao" not in facts.versions:
        yield Check("torchao", "WARN", "torchao is not installed: no FP8, INT8 or INT4 weights", 'pip install "overflowml[quantize]"')
    else:
        yield _version_check(facts, "torchao", "WARN")


def check_hub(facts: Facts) -> Iterator[Check]:
    """What reads repositories by their id."""
    if "huggingface_hub" not in facts.versions:
        yield Check("hub", "WARN", "huggingface_hub is not installed: models can only be given as folders", "pip install huggingface_hub")
        return
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if facts.variables.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE"):
            fix = f"set {name}=" if "windows" in facts.machine.environment else f"unset {name}"
            yield Check("hub", "WARN", f"{name} is set: a model that is not in the cache yet is not found", fix)
            return
    yield Check("hub", "PASS", f"huggingface_hub {facts.versions['huggingface_hub']}")


def _version_check(facts: Facts, name: str, too_old: str) -> Check:
    version = facts.versions[name]
    first = RUN_WITH[name][0]
    if numbers(version) < numbers(first):
        text = f"{name} {version} is too old: {first} is the oldest that is supported"
        return Check(name, "FAIL" if too_old == "FAIL" else "WARN", text, f'pip install --upgrade "{name}>={first}"')
    return _newer(name, version, f"{name} {version}")


def _newer(name: str, version: str, shown: str) -> Check:
    last = RUN_WITH[name][1]
    if numbers(version)[:2] > numbers(last):
        return Check(
            name, "WARN", f"{shown} is newer than {last}, the last that was tested", f'if it fails: pip install "{name}=={last}.*"'
        )
    return Check(name, "PASS", shown)
