"""What an experience knows of its tokens before the first update: whatever the objective asks for, and nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.batching import Experience, Forward, completion_tokens, sampler_logprobs, uncertain_tokens
from grpo_lightning.objective import Gather, Objective
from grpo_lightning.policy import Policy, Unadapted
from grpo_lightning.types import Coefficients, Rewards, Rollout, ScoredGroups

ROW = torch.float32
"""Of log-probabilities on a rank without samples; one with samples has the policy's precision."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Fills in the columns of an experience.

    Args:
        objective: Says which are needed.
        policy: As it is before the first update.
        reference: None where the objective needs none.
        forward: How samples go through a policy.
        num_updates: Optimizer steps of an iteration.
        coefficients: Of the moment.
        gather: A collective over the ranks.
    """

    objective: Objective
    policy: Policy
    reference: Policy | Unadapted | None
    forward: Forward
    num_updates: int
    coefficients: Coefficients
    gather: Gather

    def fill_in(
        self, experience: Experience, groups: ScoredGroups, rollout: Rollout, rewards: Rewards
    ) -> tuple[Experience, Tensor]:
        """Agree on pieces, add log-probabilities, then the advantages that may depend on them. A collective.

        Args:
            experience: This rank's samples.
            groups: This rank's; valid is what takes part in the statistics.
            rollout: What the samples come from.
            rewards: Of the rollout.

        Returns:
            The experience, and the advantage of each completion of the rollout: the mean over its tokens where they
            differ.
        """
        experience = self._with_logprobs(self.forward.agreed(experience), rollout)
        tokens = completion_tokens(rollout, rewards, experience) if self.objective.needs_tokens else None
        advantages_BT = self.objective.advantages(groups, self.coefficients, tokens=tokens, gather=self.gather)
        lengths_B = groups.lengths_PG.flatten().clamp(min=1) if advantages_BT.shape[1] > 1 else 1
        places = ((slot, index) for slot in rollout.slots for index in range(rollout.group_size))
        by_place = {
            place: row[: len(completion.token_ids)].clone()  # a view would be saved with all the others
            for place, row, completion in zip(places, advantages_BT.unbind(), rollout.completions, strict=True)
        }
        experience = experience.with_column("advantages", by_place, dtype=torch.float64)
        return experience, advantages_BT.sum(dim=1) / lengths_B

    def _with_logprobs(self, experience: Experience, rollout: Rollout) -> Experience:
        """Those of the old policy, of the reference and of the sampler."""
        if self.objective.entropy_mask is not None:
            old = self.forward.scores(self.policy, experience)
            threshold = self.objective.entropy_mask.threshold
            kept = uncertain_tokens(experience, old.entropies, threshold=threshold, gather=self.gather)
            experience = experience.with_column("policy_mask", kept, dtype=torch.bool)
            experience = experience.with_column("old_logprobs", old.logprobs, dtype=ROW)
        elif self.objective.needs_old_logprobs(num_updates=self.num_updates):
            logprobs = self.forward.logprobs(self.policy, experience)
            experience = experience.with_column("old_logprobs", logprobs, dtype=ROW)
        if self.reference is not None:
            logprobs = self.forward.logprobs(self.reference, experience)
            experience = experience.with_column("reference_logprobs", logprobs, dtype=ROW)
        rows = sampler_logprobs(rollout)
        return experience.with_column("sampler_logprobs", rows, dtype=torch.float64)
