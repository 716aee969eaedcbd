"""The most uncertain tokens of each global minibatch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from grpo_lightning.batching.experience import Experience, Place


def uncertain_tokens(
    experience: Experience,
    entropies: Mapping[Place, Tensor],
    *,
    threshold: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], Tensor],
) -> dict[Place, Tensor]:
    """bool, of every sample: the tokens whose entropy reaches the threshold of its minibatch.

    Args:
        experience: This rank's samples.
        entropies: Of their tokens.
        threshold: From the entropies of all loss tokens of a minibatch, over all ranks, to a scalar.
        gather: Puts the values of all ranks together; called once per minibatch.
    """
    kept: dict[Place, Tensor] = {}
    for samples in experience.minibatches:
        of_loss_tokens = [entropies[s.place][s.loss_mask] for s in samples]
        least = threshold(gather(torch.cat([*of_loss_tokens, torch.empty(0)]).double()))
        kept |= {s.place: entropies[s.place] >= least for s in samples}
    return kept
