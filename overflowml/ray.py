"""Batches of work on a cluster: ``overflowml.ray.map``. Ray is imported by the call."""

from __future__ import annotations

from overflowml_ray.mapping import map

__all__ = ["map"]
