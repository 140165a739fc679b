"""Reads which CPU this is and which vector extensions it has. Knows nothing of memory."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

ISA_WORDS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8", "neon", "sve", "i8mm", "bf16")
"""Extensions that decide how fast a CPU multiplies matrices; names as Linux prints them in /proc/cpuinfo, ``asimd`` as "neon"."""

_WINDOWS_FEATURES = {40: "avx2", 41: "avx512f", 19: "neon"}  # PF_AVX2_, PF_AVX512F_, PF_ARM_NEON_INSTRUCTIONS_AVAILABLE of winnt.h
_MACOS_FEATURES = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
}
_NAME_CHARS = 200


def read_text(path: Path) -> str | None:
    """A small text file, None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def cpu_name(root: Path = Path("/")) -> str:
    """The CPU's name for itself, its architecture where it has none.

    Args:
        root: where /proc is looked for.
    """
    if sys.platform == "darwin":
        name = _sysctl_text("machdep.cpu.brand_string")
    elif sys.platform == "win32":
        name = _registry_name()
    else:
        name = next((value for key, value in _cpuinfo(root) if key in ("model name", "Model", "cpu model")), "")
    return (name.strip() or platform.machine())[:_NAME_CHARS]


def cpu_isa(root: Path = Path("/")) -> frozenset[str]:
    """Vector extensions, of ``ISA_WORDS``.

    Args:
        root: where /proc is looked for.
    """
    if sys.platform == "darwin":
        return frozenset(word for name, word in _MACOS_FEATURES.items() if _sysctl_number(name))
    if sys.platform == "win32":
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        return frozenset(word for number, word in _WINDOWS_FEATURES.items() if present(number))
    flags = next((value.split() for key, value in _cpuinfo(root) if key in ("flags", "Features")), [])
    found = {"neon" if flag == "asimd" else flag for flag in flags}
    return frozenset(word for word in ISA_WORDS if word in found)


def last_level_cache_bytes(root: Path = Path("/")) -> int:
    """Size of the largest cache of the first core; 0 where nobody tells (Linux tells)."""
    sizes = []
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d{1,9})([KM])", (read_text(path) or "").strip())
        if match:
            sizes.append(int(match[1]) * (2**10 if match[2] == "K" else 2**20))
    return max(sizes, default=0)


def _cpuinfo(root: Path) -> list[tuple[str, str]]:
    fields = []
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.append((key.strip(), value.strip()))
    return fields


def _sysctl_text(name: str) -> str:
    """A text of macOS' sysctl (man 3 sysctlbyname), empty where there is none."""
    raw = _sysctl(name)
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _sysctl_number(name: str) -> int:
    return int.from_bytes(_sysctl(name)[:8], "little")


def _sysctl(name: str) -> bytes:
    try:
        function = ctypes.CDLL(None).sysctlbyname
    except (OSError, AttributeError, TypeError):
        return b""
    size = ctypes.c_size_t(256)
    buffer = ctypes.create_string_buffer(size.value)
    failed = function(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
    return b"" if failed else buffer.raw[: size.value]


def _registry_name() -> str:
    try:
        import winreg
    except ImportError:
        return ""
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:  # type: ignore[attr-defined]
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0])  # type: ignore[attr-defined]
    except OSError:
        return ""
