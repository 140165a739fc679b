"""Leaves weights unread that lie in files as they are used, in one piece or in several, and notes where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, dot_natural_key, rename_source_key

from overflowml_core.inspect import Checkpoint, checkpoint_of_files
from overflowml_core.loading import Loading, Origin, joined
from overflowml_core.runtime.structure import TORCH_DTYPES
from overflowml_transformers.scattered import pieces_of

_Pattern = tuple[Any, str] | None
"""The host's converter that takes a key, and which of its source patterns matched; None where the key is renamed at most."""


def defer_weights(model: Any, checkpoint_files: Iterable[str], load_config: Any, request: Loading) -> tuple[set[str], dict[str, Any]]:
    """Give the model parameters without data for everything that can be read from its files later.

    Args:
        model: on the meta device, in its final structure.
        checkpoint_files: safetensors.
        load_config: the host's, with its weight mapping and dtypes.
        request: notes the origins.

    Returns:
        Names of the model's parameters that the host need not load, and a lazy state dict of what it must.

    Raises:
        BadCheckpoint: a file is missing or broken.
    """
    checkpoint = checkpoint_of_files([Path(name) for name in checkpoint_files])
    target_of = _renamer(model, load_config)
    dtype_of = _dtype_chooser(model, load_config)
    expected = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    targets: dict[str, list[str]] = {}
    patterns: dict[str, _Pattern] = {}
    # The host's own order: what a converter collects is put together in it.
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        target, patterns[key] = target_of(key, expected)
        targets.setdefault(target, []).append(key)
    kept = _tied_twice(model, targets) if not request.describe_only else set()
    deferred: set[str] = set()
    left: dict[str, Any] = {}
    opened: dict[Path, Any] = {}
    for target, keys in targets.items():
        shape = tuple(expected[target].shape) if target in parameters and target not in kept else None
        pieces = _pieces(checkpoint, keys, patterns, shape) if shape is not None else ()
        if shape is not None and pieces:
            parameter = _replace(model, target, dtype_of(target, expected[target]))
            if len(pieces) == 1:
                request.defer(parameter, replace(pieces[0], shape=shape))
            else:
                request.scatter(parameter, pieces)
            deferred.add(target)
        elif not request.describe_only:
            for key in keys:
                path = checkpoint.tensors[key].path
                if path not in opened:
                    opened[path] = safe_open(path, framework="pt")
                left[key] = opened[path].get_slice(key)
    if request.describe_only:
        deferred |= _defer_everything(model, expected, parameters - deferred, targets, dtype_of)
    return deferred, left


def _pieces(checkpoint: Checkpoint, keys: Sequence[str], patterns: Mapping[str, _Pattern], shape: tuple[int, ...]) -> tuple[Origin, ...]:
    """The pieces of files that make a weight of this shape, one behind the other; empty where the host must read and convert."""
    origins = {key: _origin(checkpoint, key) for key in keys}
    if any(origin.dtype not in TORCH_DTYPES for origin in origins.values()):
        return ()
    matched = [pattern for pattern in map(patterns.__getitem__, keys) if pattern is not None]
    if not matched:
        return tuple(origins.values()) if len(keys) == 1 and origins[keys[0]].shape == shape else ()
    converter = matched[0][0]
    # Of keys with several converters, or with none, the first decides what happens to all.
    if len(matched) < len(keys) or any(other is not converter for other, _ in matched):
        return ()
    sources: dict[str, list[Origin]] = {}
    for key, (_, pattern) in zip(keys, matched, strict=True):
        sources.setdefault(pattern, []).append(origins[key])
    return joined(pieces_of(converter, sources, shape))


def _origin(checkpoint: Checkpoint, key: str) -> Origin:
    located = checkpoint.tensors[key]
    entry = located.entry
    return Origin(located.path, entry.offset_bytes, entry.nbytes, entry.dtype, entry.shape)


def _renamer(model: Any, load_config: Any) -> Callable[[str, dict[str, Any]], tuple[str, _Pattern]]:
    mapping = load_config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def target_of(key: str, expected: dict[str, Any]) -> tuple[str, _Pattern]:
        # The host's own two steps (core_model_loading.convert_and_load_state_dict_in_model).
        target, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if target not in expected and key in expected:
            target, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        return target, None if pattern is None else (by_pattern[pattern], pattern)

    return target_of


def _dtype_chooser(model: Any, load_config: Any) -> Callable[[str, torch.Tensor], torch.dtype]:
    plan = load_config.dtype_plan or {}
    pattern, by_group = None, {}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan.keys()))

    def dtype_of(name: str, empty: torch.Tensor) -> torch.dtype:
        match = pattern.search(name) if pattern is not None else None
        if match is not None and match.lastgroup is not None:
            chosen: torch.dtype = plan[by_group[match.lastgroup]]
            return chosen
        return empty.dtype

    return dtype_of


def _tied_twice(model: Any, targets: dict[str, list[str]]) -> set[str]:
    """Names of tied weights that the checkpoint holds twice: the host compares their values before it ties them, so it must read them."""
    tied: set[str] = set()
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target in targets and source in targets:
            tied |= {target, source}
    return tied


def _defer_everything(
    model: Any,
    expected: dict[str, torch.Tensor],
    names: set[str],
    targets: dict[str, list[str]],
    dtype_of: Callable[[str, torch.Tensor], torch.dtype],
) -> set[str]:
    """For a description: what a conversion would make counts as loaded, so that nothing is initialized or reported."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for name in names:
        if name not in tied:
            _replace(model, name, dtype_of(name, expected[name]))
    # A tied weight counts as missing, so that the host ties it.
    return (set(expected) - tied) | {name for name in tied if name in targets and name not in names}


def _replace(model: Any, name: str, dtype: torch.dtype) -> nn.Parameter:
    """A new parameter without data in the place of an old one, marked so that the host does not initialize it."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path) if path else model
    old = module._parameters[attribute]
    parameter = nn.Parameter(torch.empty(old.shape, dtype=dtype, device="meta"), requires_grad=dtype.is_floating_point)
    parameter._is_hf_initialized = True
    setattr(module, attribute, parameter)
    return parameter
