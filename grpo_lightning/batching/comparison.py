"""From a scored rollout to what advantages are computed from."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_lightning.batching.experience import Experience
from grpo_lightning.batching.minibatches import num_loss_tokens
from grpo_lightning.types import CompletionTokens, Rewards, Rollout, ScoredGroups


def scored_groups(rollout: Rollout, rewards: Rewards) -> ScoredGroups:
    """The groups of this rank, in the order of their slots; a completion is valid where its rewards are."""
    shape_PG = (len(rollout.prompts), rollout.group_size)
    return ScoredGroups(
        slots_P=torch.tensor(rollout.slots),
        rewards_PG=rewards.totals_B.view(shape_PG),
        valid_PG=rewards.valid_B.view(shape_PG),
        values_PGK=rewards.values_BK.view(*shape_PG, -1),
        weights_K=rewards.values_BK.new_tensor(rewards.weights),
        lengths_PG=torch.tensor([num_loss_tokens(c) for c in rollout.completions]).view(shape_PG),
    )


def completion_tokens(rollout: Rollout, rewards: Rewards, experience: Experience) -> CompletionTokens:
    """The tokens of this rank's completions, with what the experience knows of those that it learns from.

    A reward that gave one number ends its only step at the last token.
    """
    lengths = [len(completion.token_ids) for completion in rollout.completions]
    scores_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.float64)
    is_step_BT = torch.zeros(scores_BT.shape, dtype=torch.bool)
    for k, (name, weight) in enumerate(zip(rewards.names, rewards.weights, strict=True)):
        for b in (~rewards.values_BK[:, k].isnan()).nonzero().flatten().tolist():
            steps = rewards.steps[name][b] if name in rewards.steps else None
            ends = [lengths[b] - 1] if steps is None else list(steps.end_positions)
            of_steps = rewards.values_BK[b, k : k + 1] if steps is None else scores_BT.new_tensor(steps.scores)
            scores_BT[b, ends] += weight * of_steps
            is_step_BT[b, ends] = True
    places = [(slot, index) for slot in rollout.slots for index in range(rollout.group_size)]
    samples = {sample.place: sample for sample in experience.samples()}
    example = next(iter(samples.values()), experience.blank)  # has the policy's precision, where there is one

    def column(name: str) -> Tensor | None:
        if getattr(example, name) is None:
            return None
        nothing = getattr(example, name).new_zeros(max(lengths))
        rows = [getattr(samples[place], name) if place in samples else nothing for place in places]
        return pad_sequence([nothing, *rows], batch_first=True)[1:]

    mask_BT = column("loss_mask")
    assert mask_BT is not None, "every sample has a loss mask"
    return CompletionTokens(
        mask_BT=mask_BT,
        step_scores_BT=scores_BT,
        is_step_BT=is_step_BT,
        old_logprobs_BT=column("old_logprobs"),
        reference_logprobs_BT=column("reference_logprobs"),
    )
