"""Reference models: what the KL penalty holds the policy to."""

from typing import Any

from torch import Tensor

from grpo_lightning.policy.adaptation import without_adapter
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import ForwardBatch, TokenScores


def frozen_copy(policy: Policy, weights: dict[str, Tensor]) -> Policy:
    """A second policy that is never trained, with the given weights: the reference model of the KL penalty.

    Args:
        policy: The policy whose architecture it shares.
        weights: The reference's weights, the state dict of a policy's model.
    """
    model = type(policy.model)(policy.model.config).to(next(policy.model.parameters()).dtype)
    model.load_state_dict(weights)
    model.requires_grad_(False)
    return Policy(model, policy.tokenizer)


class Unadapted:
    """A policy without its adapter: the reference model that takes no memory. It is called as the policy is.

    Args:
        policy: With an adapter, whose other weights are frozen.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, batch: ForwardBatch, temperature: float, **settings: Any) -> TokenScores:
        """Score the completion tokens of `batch`, as `Policy.forward`."""
        with without_adapter(self._policy.model):
            scores: TokenScores = self._policy(batch, temperature, **settings)
        return scores
