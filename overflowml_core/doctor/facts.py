"""Gathers what an examination judges by: versions from metadata, torch's build from its files, devices from drivers. Judges nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from overflowml_core.activation import State, state_of, this_environment
from overflowml_core.errors import OverflowmlError
from overflowml_core.inspect.calibration import disk_of
from overflowml_core.inspect.devices import driver_devices
from overflowml_core.inspect.driver import DriverDevice
from overflowml_core.inspect.torch_build import TorchBuild, torch_build
from overflowml_core.machine import Machine
from overflowml_core.traps import Surroundings

PACKAGES = ("overflowml", "torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "torchao", "psutil")
"""Distributions whose versions matter here."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an examination judges by.

    Attributes:
        python: version of the interpreter.
        versions: of the distributions that are installed, by name.
        torch: the build that would be imported, None without.
        devices: as their drivers report them, whether torch can use them or not.
        machine: as plans see it.
        ram_bytes: of the whole machine, whatever this process may use of it.
        cache_folder: where packed weights, profiles and calibrations are kept.
        cache_problem: why nothing can be written there; empty where it can.
        cache_file_system: "ext4", "tmpfs"; empty where nobody said.
        other_calibrations: files of calibrations that were made with other hardware, drivers or torch.
        variables: environment variables.
        plugins, faults: names of plugins at work; reasons why others are not, by name.
        architecture: of the CPU, as ``platform.machine`` names it.
        activation: whether a ``.pth`` file installs the hosts at start-up.
    """

    python: str
    versions: Mapping[str, str]
    torch: TorchBuild | None
    devices: tuple[DriverDevice, ...]
    machine: Machine
    ram_bytes: int
    cache_folder: Path
    cache_problem: str = ""
    cache_file_system: str = ""
    other_calibrations: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict)
    activation: State = "inactive"
    architecture: str = ""

    @property
    def nvidia(self) -> tuple[DriverDevice, ...]:
        """NVIDIA's devices that the driver knows."""
        return tuple(device for device in self.devices if device.backend == "cuda")

    @property
    def surroundings(self) -> Surroundings:
        """What traps of the environment ask for."""
        kinds = {device.kind for device in self.devices} | {a.kind for a in self.machine.accelerators}
        return Surroundings(
            environment=self.machine.environment,
            kinds=frozenset(kinds | ({"nvidia"} if self.nvidia else set())),
            variables=self.variables,
            cache_folder=self.cache_folder.as_posix(),
            cache_file_system=self.cache_file_system,
        )


def built_backends(facts: Facts) -> frozenset[str]:
    """Backends that the installed torch is built for; Apple's is in every build for macOS."""
    torch = facts.torch
    if torch is None:
        return frozenset()
    found = {name for name, version in (("cuda", torch.cuda), ("rocm", torch.hip), ("xpu", torch.xpu)) if version}
    return frozenset(found | ({"mps"} if "macos" in facts.machine.environment else set()))


def gather(
    machine: Machine,
    cache_folder: Path,
    variables: Mapping[str, str],
    plugins: tuple[str, ...] = (),
    faults: Mapping[str, str] | None = None,
) -> Facts:
    """The facts of this process. Imports no torch, and writes nothing but a file in the cache folder that it removes again.

    Args:
        machine: as detected.
        cache_folder: it need not exist yet.
        variables: the environment's.
        plugins: names of those at work.
        faults: reasons of those that are not, by name.
    """
    folder = cache_folder.absolute()
    return Facts(
        python=platform.python_version(),
        versions=_versions(),
        torch=torch_build(),
        devices=tuple(driver_devices()),
        machine=machine,
        ram_bytes=psutil.virtual_memory().total,
        cache_folder=folder,
        cache_problem=_write_problem(folder),
        cache_file_system=_file_system(folder),
        other_calibrations=0 if machine.rates.measured else len(list(folder.glob("calibration/*.json"))),
        variables=dict(variables),
        plugins=plugins,
        faults=dict(faults or {}),
        activation=_activation(),
        architecture=platform.machine(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            # A folder that an uninstallation left behind has metadata without a version.
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:
            found[name] = version
    return found


def _write_problem(folder: Path) -> str:
    """Why nothing can be written into a folder that may not exist yet."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is no folder"
    probe = place / f".overflowml-{os.getpid()}"
    try:
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        return f"{place}: {error.strerror}"
    return ""


def _file_system(folder: Path) -> str:
    name, _, device = disk_of(folder).partition(" ")
    return name if device else ""


def _activation() -> State:
    try:
        return state_of(this_environment())
    except OverflowmlError:  # a file that cannot be read is none that this interpreter runs
        return "inactive"
