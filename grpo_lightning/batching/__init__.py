"""From a rollout to micro-batches of nearly equal cost, and through the training forward."""

from grpo_lightning.batching.bins import balanced_bins, chunks
from grpo_lightning.batching.experience import Experience, Sample
from grpo_lightning.batching.forward import Forward
from grpo_lightning.batching.minibatches import cut_into_minibatches, global_counts
from grpo_lightning.batching.padded import padded
from grpo_lightning.batching.shape import IterationShape

__all__ = [
    "Experience",
    "Forward",
    "IterationShape",
    "Sample",
    "balanced_bins",
    "chunks",
    "cut_into_minibatches",
    "global_counts",
    "padded",
]
