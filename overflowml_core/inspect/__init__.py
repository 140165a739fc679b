"""Reads facts: safetensors headers, model folders, RAM and cores, accelerators. Decides nothing, reads no weight, imports no torch."""

from __future__ import annotations

from overflowml_core.inspect.accelerators import find_accelerators
from overflowml_core.inspect.checkpoint import (
    Checkpoint,
    FolderKind,
    Located,
    checkpoint_of_files,
    find_weights,
    kind_of_folder,
    open_checkpoint,
    read_json,
)
from overflowml_core.inspect.host import anonymous_bytes, disk_free_bytes, host_memory, pinnable_bytes
from overflowml_core.inspect.machine import detect_machine
from overflowml_core.inspect.safetensors import DTYPE_BITS, Header, TensorEntry, read_header

__all__ = [
    "Checkpoint",
    "DTYPE_BITS",
    "FolderKind",
    "Header",
    "Located",
    "TensorEntry",
    "anonymous_bytes",
    "checkpoint_of_files",
    "detect_machine",
    "disk_free_bytes",
    "find_accelerators",
    "find_weights",
    "host_memory",
    "kind_of_folder",
    "open_checkpoint",
    "pinnable_bytes",
    "read_header",
    "read_json",
]
