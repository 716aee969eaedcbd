import math

import torch

from grpo_lightning.batching import (
    Experience,
    IterationShape,
    Padded,
    completion_tokens,
    cut_into_minibatches,
    scored_groups,
)
from grpo_lightning.types import Completion, FinishReason, MinibatchCounts, Prompt, Rewards, Rollout, StepScores

NAN = math.nan


def completion(length, loss_mask=None):
    return Completion(
        token_ids=tuple(range(length)),
        sampler_logprobs=(0.0,) * length,
        text="",
        finish_reason=FinishReason.EOS,
        loss_mask=loss_mask,
    )


# Rank 1 of 2: the slots 1 and 3, two completions each.
ROLLOUT = Rollout(
    iteration=0,
    slots=(1, 3),
    prompts=(Prompt(index=5, token_ids=(9,), text=""), Prompt(index=6, token_ids=(9,), text="")),
    completions=(completion(3), completion(1), completion(4, (True, False, True, True)), completion(2)),
)
REWARDS = Rewards(
    names=("process", "format"),
    weights=(2.0, 0.5),
    # The sums of the steps; the second reward does not apply to the second completion, and failed on the last.
    values_BK=torch.tensor([[0.75, 1.0], [1.0, NAN], [0.5, 0.0], [1.0, NAN]], dtype=torch.float64),
    failed_BK=torch.tensor([[False, False], [False, False], [False, False], [False, True]]),
    steps={"process": (StepScores((0.5, 0.25), (0, 2)), StepScores((1.0,), (0,)), StepScores((0.5,), (1,)), None)},
)


def experience(learned, dtype=torch.float32):
    shape = IterationShape(prompts_per_iteration=4, group_size=2, num_epochs=1, num_minibatches=1)
    built = Experience.build(
        iteration=0,
        minibatches=cut_into_minibatches(ROLLOUT, torch.tensor(learned), shape),
        counts=[MinibatchCounts(1, 1, 1)],
        metrics={},
        accumulate_grad_batches=1,
        layout=Padded(),
    )
    rows = {s.place: torch.full((len(s.completion_ids),), -1.0 - s.slot, dtype=dtype) for s in built.samples()}
    return built.with_column("old_logprobs", rows, dtype=torch.float32)


def test_groups_by_hand():
    groups = scored_groups(ROLLOUT, REWARDS)
    assert groups.slots_P.tolist() == [1, 3]
    assert groups.valid_PG.tolist() == [[True, True], [True, False]]
    assert groups.rewards_PG[groups.valid_PG].tolist() == [2.0, 2.0, 1.0]
    assert groups.lengths_PG.tolist() == [[3, 1], [3, 2]]
    assert groups.values_PGK[0].tolist()[0] == [0.75, 1.0]
    assert groups.weights_K.tolist() == [2.0, 0.5]


def test_tokens_by_hand():
    tokens = completion_tokens(ROLLOUT, REWARDS, experience([True, False, True, False]))
    # Of a completion without a sample no token is a loss token, but its steps take part in the statistics.
    assert tokens.mask_BT.tolist() == [
        [True, True, True, False],
        [False, False, False, False],
        [True, False, True, True],
        [False, False, False, False],
    ]
    # Twice the step scores; the format's number is half a point at the last token, where the process may have a step.
    assert tokens.step_scores_BT.tolist() == [
        [1.0, 0.0, 0.5 + 0.5, 0.0],
        [2.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 2.0, 0.0, 0.0],
    ]
    assert tokens.is_step_BT.tolist() == [
        [True, False, True, False],
        [True, False, False, False],
        [False, True, False, True],
        [False, True, False, False],
    ]
    assert tokens.old_logprobs_BT.tolist() == [[-2, -2, -2, 0], [0] * 4, [-4] * 4, [0] * 4]
    assert tokens.reference_logprobs_BT is None


def test_log_probabilities_keep_their_precision():
    tokens = completion_tokens(ROLLOUT, REWARDS, experience([True, False, True, False], dtype=torch.float64))
    assert tokens.old_logprobs_BT.dtype == torch.float64


def test_no_samples_at_all_leave_tokens_without_a_loss():
    tokens = completion_tokens(ROLLOUT, REWARDS, experience([False] * 4))
    assert not tokens.mask_BT.any()
    assert tokens.old_logprobs_BT.shape == tokens.mask_BT.shape == (4, 4)
