"""From a rollout to micro-batches of nearly equal cost, and through the training forward."""

from grpo_lightning.batching.comparison import completion_tokens, scored_groups
from grpo_lightning.batching.experience import Experience, Place, Sample
from grpo_lightning.batching.flat import Packed, SharedPrefix
from grpo_lightning.batching.forward import Forward, InStep
from grpo_lightning.batching.layout import Layout, Row
from grpo_lightning.batching.minibatches import cut_into_minibatches, global_counts, sampler_logprobs
from grpo_lightning.batching.padded import Padded, usable_layout
from grpo_lightning.batching.shape import IterationShape
from grpo_lightning.batching.uncertainty import uncertain_tokens

__all__ = [
    "Experience",
    "Forward",
    "InStep",
    "IterationShape",
    "Layout",
    "Packed",
    "Padded",
    "Place",
    "Row",
    "Sample",
    "SharedPrefix",
    "completion_tokens",
    "cut_into_minibatches",
    "global_counts",
    "sampler_logprobs",
    "scored_groups",
    "uncertain_tokens",
    "usable_layout",
]
