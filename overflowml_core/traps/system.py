"""Traps of the environment: drivers, variables, file systems. They are looked for in surroundings that somebody else has read."""

from __future__ import annotations

from collections.abc import Callable

from overflowml_core.facts import Machine, Network
from overflowml_core.plan import Plan
from overflowml_core.traps.trap import Finding, Surroundings, Trap
from overflowml_core.units import format_bytes

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names under which torch reads its allocator's settings (torch 2.13, c10/core/AllocatorConfig.h and c10/cuda/CUDAAllocatorConfig.h)."""
_ON = ("1", "true", "yes", "on")
_IN_MEMORY = ("tmpfs", "ramfs")
_REMOTE = ("9p", "drvfs", "v9fs", "nfs", "nfs4", "cifs", "smb3", "fuse.sshfs")


def _is_on(surroundings: Surroundings, name: str) -> bool:
    return surroundings.variables.get(name, "").strip().lower() in _ON


def _unset(surroundings: Surroundings, name: str) -> str:
    """How a person takes a variable out of the environment that this was started from."""
    return f"set {name}=" if "windows" in surroundings.environment else f"unset {name}"


def _look_expandable(surroundings: Surroundings) -> Finding | None:
    if "wddm" not in surroundings.environment:
        return None
    for name in _ALLOCATOR_VARIABLES:
        settings = surroundings.variables.get(name, "").replace(" ", "").lower().split(",")
        if "expandable_segments:true" in settings:
            detail = f"{name} asks for expandable segments, which this driver model (WDDM) does not have"
            return Finding("expandable-segments-on-wddm", detail, _unset(surroundings, name))
    return None


def _expandable_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    if "wddm" not in machine.environment or machine.compute.kind != "cuda" or not plan.managed:
        return ""
    return f"{machine.compute.name} runs under WDDM, where the usual cure for a fragmented device memory does nothing"


def _spill_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    if not machine.environment & {"wddm", "wsl2"} or machine.compute.kind != "cuda" or not plan.managed:
        return ""
    free = machine.compute.free_bytes
    if plan.weight_bytes <= free:
        return ""
    return f"{format_bytes(plan.weight_bytes)} of weights and {format_bytes(free)} free: loaded whole they would spill into RAM unnoticed"


def _look_blocking(surroundings: Surroundings) -> Finding | None:
    for name in ("CUDA_LAUNCH_BLOCKING", "HIP_LAUNCH_BLOCKING"):
        if _is_on(surroundings, name):
            return Finding("launches-block", f"{name} makes every kernel and copy wait for the one before", _unset(surroundings, name))
    return None


def _look_no_cache(surroundings: Surroundings) -> Finding | None:
    for name in ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_HIP_MEMORY_CACHING"):
        # torch asks only whether it is there, not what it says.
        if name in surroundings.variables:
            return Finding(
                "no-allocator-cache",
                f"{name} makes every allocation a call of the driver, which waits for all work",
                _unset(surroundings, name),
            )
    return None


def _look_watermark(surroundings: Surroundings) -> Finding | None:
    name = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
    if "macos" not in surroundings.environment or name not in surroundings.variables:
        return None
    try:
        ratio = float(surroundings.variables[name])
    except ValueError:
        return Finding("mps-without-limit", f"{name}={surroundings.variables[name]!r} is no number", _unset(surroundings, name))
    if ratio != 0:
        return None
    return Finding(
        "mps-without-limit", f"{name}=0.0 takes the limit of the GPU's memory away: the system may fail", _unset(surroundings, name)
    )


def _look_hidden(surroundings: Surroundings) -> Finding | None:
    if "nvidia" not in surroundings.kinds:
        return None
    value = surroundings.variables.get("CUDA_VISIBLE_DEVICES")
    if value is None or value.strip() not in ("", "-1", "none", "NoDevFiles"):
        return None
    return Finding(
        "devices-hidden", f"CUDA_VISIBLE_DEVICES={value!r} hides every device from torch", _unset(surroundings, "CUDA_VISIBLE_DEVICES")
    )


def _look_tmpfs(surroundings: Surroundings) -> Finding | None:
    if surroundings.cache_file_system not in _IN_MEMORY:
        return None
    detail = f"the cache folder {surroundings.cache_folder} lies in a {surroundings.cache_file_system}: what is put on disk there takes RAM"
    return Finding("cache-in-memory", detail, "export OVERFLOWML_CACHE=FOLDER, with a folder on a disk")


def _look_remote(surroundings: Surroundings) -> Finding | None:
    if surroundings.cache_file_system not in _REMOTE:
        return None
    where = "a Windows drive" if "wsl2" in surroundings.environment and surroundings.cache_file_system not in _REMOTE[3:] else "a network"
    detail = (
        f"the cache folder {surroundings.cache_folder} lies on {where} ({surroundings.cache_file_system}): weights come from there slowly"
    )
    return Finding("cache-on-remote-drive", detail, "export OVERFLOWML_CACHE=FOLDER, with a folder on a disk of this system")


def _look_wsl_pinning(surroundings: Surroundings) -> Finding | None:
    if "wsl2" not in surroundings.environment or "nvidia" not in surroundings.kinds:
        return None
    detail = "WSL2 may page-lock far less than its RAM; what cannot be pinned is copied at about half the rate"
    return Finding("wsl2-pinning", detail, "overflowml calibrate (measures both rates), or run on Linux or Windows itself")


def _variable(name: str, look: Callable[[Surroundings], Finding | None], when: str, symptom: str, does: str, *evidence: str) -> Trap:
    return Trap(name=name, kind="environment", applies_when=when, symptom=symptom, what_we_do=does, evidence=evidence, look=look)


TRAPS: tuple[Trap, ...] = (
    Trap(
        name="expandable-segments-on-wddm",
        kind="environment",
        applies_when="torch's allocator is told to use expandable segments under Windows' display driver model",
        symptom="a warning that they are not supported on this platform, and device memory that fragments until an allocation fails",
        what_we_do="slots are allocated once and reused, so nothing fragments; doctor says how to take the setting out",
        evidence=("pytorch #122057", "torch 2.13.0 c10/cuda/CUDAAllocatorConfig.h, expandable_segments"),
        relevance=_expandable_relevance,
        look=_look_expandable,
    ),
    Trap(
        name="memory-spills-into-ram",
        kind="plan",
        applies_when="an NVIDIA driver for Windows (also under WSL2) is out of device memory",
        symptom="no error, and steps that take minutes instead of seconds",
        what_we_do="a plan takes what is free when it is made, never the device's total, so that nothing spills",
        evidence=("microsoft/WSL #11050", "llama.cpp #15649"),
        relevance=_spill_relevance,
    ),
    _variable(
        "launches-block",
        _look_blocking,
        "CUDA_LAUNCH_BLOCKING is left over from debugging",
        "copies and compute take turns: a streamed model takes the sum of both instead of the larger one",
        "doctor says so; copies are ordered by events and right with it too",
        "CUDA C++ Programming Guide, CUDA environment variables",
    ),
    _variable(
        "no-allocator-cache",
        _look_no_cache,
        "PYTORCH_NO_CUDA_MEMORY_CACHING is left over from debugging",
        "each activation is allocated by the driver, which waits for the device",
        "doctor says so; slots and resident weights are allocated once in any case",
        "torch 2.13.0 c10/cuda/CUDACachingAllocator.cpp",
    ),
    _variable(
        "mps-without-limit",
        _look_watermark,
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO is 0.0, as an error message of torch proposes",
        "no error any more: macOS swaps until the process or the system dies",
        "the budget is what Metal recommends, with or without the variable; doctor says how to take it out",
        "pytorch #96814",
    ),
    _variable(
        "devices-hidden",
        _look_hidden,
        "CUDA_VISIBLE_DEVICES is empty or -1 on a machine with an NVIDIA device",
        "torch sees no device, and everything runs on the CPU",
        "doctor says so; a plan names the device that it is for",
        "CUDA C++ Programming Guide, CUDA environment variables",
    ),
    _variable(
        "cache-in-memory",
        _look_tmpfs,
        "the cache folder lies in a file system that is kept in RAM (tmpfs)",
        "weights that a plan puts on disk take RAM and can have the process killed",
        "doctor names the folder",
        "Linux kernel filesystems/tmpfs",
    ),
    _variable(
        "cache-on-remote-drive",
        _look_remote,
        "the cache folder lies on a Windows drive seen from WSL2, or on a network",
        "streaming from disk is many times slower than the disk",
        "doctor names the folder",
        "microsoft/WSL #4197",
    ),
    _variable(
        "wsl2-pinning",
        _look_wsl_pinning,
        "weights are page-locked under WSL2",
        "CUDA out of memory after a few hundred megabytes of pinned RAM, while the device is empty",
        "what cannot be pinned waits in pageable RAM instead; doctor says so",
        "microsoft/WSL #8447",
        "microsoft/WSL #14078",
    ),
)
"""Traps of the environment. A variable that torch reads is named as torch names it."""
