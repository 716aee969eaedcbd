"""A recorded rollout: everything that either objective is given, and what both say of it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

GROUP_SIZE = 4
LENGTHS = (3, 1, 6, 2, 5, 4, 6, 2)
MAX_LENGTH = max(LENGTHS)


@dataclass(frozen=True, kw_only=True)
class RecordedRollout:
    """Two groups of four ragged completions; those of six tokens were cut off by the limit."""

    rewards_BK: Tensor
    """NaN where a reward does not apply. Multiples of 1/4, which TRL's fp32 keeps."""
    logprobs_BT: Tensor
    reference_logprobs_BT: Tensor
    entropy_BT: Tensor
    old_logprobs_BT: Tensor | None = None
    """None on the only update of a rollout."""
    sampler_logprobs_BT: Tensor | None = None
    weights_K: tuple[float, ...] = (1.0,)

    @property
    def mask_BT(self) -> Tensor:
        return torch.arange(MAX_LENGTH) < torch.tensor(LENGTHS)[:, None]

    @property
    def is_truncated_B(self) -> Tensor:
        return torch.tensor(LENGTHS) == MAX_LENGTH

    def on_policy(self) -> "RecordedRollout":
        """The same, before its only update."""
        return replace(self, old_logprobs_BT=None, sampler_logprobs_BT=None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of one optimizer step, and its gradients."""

    loss: float
    gradient_BT: Tensor
    """With respect to the log-probabilities."""
    entropy_gradient_BT: Tensor
    microbatches: list[Tensor] = field(default_factory=list)
    """The rows that were computed together."""

    @classmethod
    def of(cls, loss: Tensor, rollout: RecordedRollout, microbatches: list[Tensor]) -> "Outcome":
        leaves = (rollout.logprobs_BT, rollout.entropy_BT)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return cls(
            loss=loss.item(), gradient_BT=gradients[0], entropy_gradient_BT=gradients[1], microbatches=microbatches
        )


def recorded_rollout(**changes) -> RecordedRollout:
    """Random log-probabilities, so far apart that every clip, cap and bound of the tests acts on some tokens.

    Args:
        changes: Fields to set otherwise.
    """
    generator = torch.Generator().manual_seed(0)

    def random_BT() -> Tensor:
        return torch.randn(len(LENGTHS), MAX_LENGTH, generator=generator, dtype=torch.float64)

    logprobs_BT = -2 - random_BT().abs()
    others = [(logprobs_BT + 0.6 * random_BT()).clamp(max=-0.01) for _ in range(3)]
    recorded = RecordedRollout(
        rewards_BK=torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.0, 0.75, 0.0])[:, None],
        logprobs_BT=logprobs_BT.requires_grad_(),
        old_logprobs_BT=others[0],
        reference_logprobs_BT=others[1],
        sampler_logprobs_BT=(others[0] + 0.2 * (others[2] - logprobs_BT.detach())).clamp(max=-0.01),
        entropy_BT=random_BT().abs().float().double().requires_grad_(),  # TRL ranks them in fp32
    )
    return replace(recorded, **changes)
