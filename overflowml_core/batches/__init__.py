"""Batches that fit: predicted, corrected by what happened, halved where memory runs out. Knows no host."""

from __future__ import annotations

from overflowml_core.batches.batch import Batch, auto_batch
from overflowml_core.batches.shortage import is_out_of_memory
from overflowml_core.batches.sizer import BatchSizer

__all__ = ["Batch", "BatchSizer", "auto_batch", "is_out_of_memory"]
