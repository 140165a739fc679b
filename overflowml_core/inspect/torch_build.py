"""What the installed torch was built for, read from its files. Imports no torch, which would take two seconds."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_VERSION_FILE_LIMIT_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """A build of torch.

    Attributes:
        version: as torch names it ("2.13.0+cu128").
        cuda: version of CUDA that it was built against, empty without.
        hip: version of HIP, for ROCm.
        xpu: version of the compiler for Intel GPUs.
        known: whether its files told; an unknown build may have anything.
    """

    version: str = ""
    cuda: str = ""
    hip: str = ""
    xpu: str = ""
    known: bool = False


def torch_build() -> TorchBuild | None:
    """The build of torch that this interpreter would import; None where none is installed.

    torch writes ``torch/version.py`` when it is built, with one assignment a line: a version in quotes or None.
    """
    loaded = sys.modules.get("torch")
    if loaded is not None:
        return _of_module(loaded)
    spec = importlib.util.find_spec("torch")
    if spec is None:
        return None
    for folder in getattr(spec, "submodule_search_locations", None) or ():
        try:
            with (Path(folder) / "version.py").open(encoding="utf-8", errors="replace") as stream:
                text = stream.read(_VERSION_FILE_LIMIT_BYTES)
        except OSError:
            continue
        return TorchBuild(_assigned(text, "__version__"), _assigned(text, "cuda"), _assigned(text, "hip"), _assigned(text, "xpu"), True)
    return TorchBuild()


def has_backend_extension() -> bool:
    """Whether a package brings torch a device type of its own, which torch loads by itself (entry points ``torch.backends``)."""
    return bool(metadata.entry_points(group="torch.backends"))


def torch_version() -> str:
    """Version of the installed torch, empty without one."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _of_module(torch: object) -> TorchBuild:
    version = getattr(torch, "version", None)
    names = {name: str(getattr(version, name, None) or "") for name in ("cuda", "hip", "xpu")}
    return TorchBuild(version=str(getattr(torch, "__version__", "")), known=True, **names)


def _assigned(text: str, name: str) -> str:
    match = re.search(rf"^{name}\s*(?::[^=\n]*)?=\s*['\"]([^'\"\n]*)['\"]", text, re.M)
    return match[1] if match else ""
