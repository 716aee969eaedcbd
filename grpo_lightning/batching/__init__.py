"""Layouts of the training forward, and micro-batches of nearly equal cost."""

from grpo_lightning.batching.bins import balanced_bins, chunks
from grpo_lightning.batching.experience import Experience, Sample
from grpo_lightning.batching.padded import padded

__all__ = ["Experience", "Sample", "balanced_bins", "chunks", "padded"]
