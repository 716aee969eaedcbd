"""Reference models: what the KL penalty holds the policy to."""

from typing import Any

import torch

from grpo_lightning.policy.adaptation import without_adapter
from grpo_lightning.policy.blueprint import copy_other_tensors, other_tensors
from grpo_lightning.policy.policy import Policy
from grpo_lightning.types import ForwardBatch, TokenScores


def frozen_copy(policy: Policy) -> Policy:
    """A second policy that is never trained, for the KL penalty's reference; its weights are on the meta device.

    Args:
        policy: The policy whose architecture and precision it shares, whole or in shards.
    """
    with torch.device("meta"):
        model = type(policy.model)(policy.model.config)
    dtypes = {name: parameter.dtype for name, parameter in policy.model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    copy_other_tensors(other_tensors(policy.model), model)
    model.requires_grad_(False)
    return Policy(model, policy.tokenizer, traits=policy.traits)


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
