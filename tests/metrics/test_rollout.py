import pytest
import torch

from grpo_lightning.metrics import rollout_metrics
from grpo_lightning.types import Completion, FinishReason, Prompt, Rewards, Rollout

NAN = float("nan")


def make(lengths, truncated, accuracy, form, failed):
    """Groups of two, and two rewards, the second of weight 0.5."""
    prompts = tuple(Prompt(index=i, token_ids=(1,), text="") for i in range(len(lengths) // 2))
    completions = tuple(
        Completion(
            token_ids=(5,) * length,
            sampler_logprobs=(0.0,) * length,
            text="",
            finish_reason=FinishReason.LENGTH if cut else FinishReason.EOS,
        )
        for length, cut in zip(lengths, truncated, strict=True)
    )
    rewards = Rewards(
        names=("accuracy", "form"),
        weights=(1.0, 0.5),
        values_BK=torch.tensor([accuracy, form], dtype=torch.float64).T,
        failed_BK=torch.tensor([[False] * len(failed), failed]).T,
    )
    return Rollout(iteration=0, slots=tuple(range(len(prompts))), prompts=prompts, completions=completions), rewards


# Totals: 1.5, 0.5, 0.5, 0.5 and, in the last group, 1 (form does not apply) and none (form failed).
ARGUMENTS = {
    "lengths": [2, 4, 6, 8, 10, 12],
    "truncated": [False, False, False, False, True, True],
    "accuracy": [1.0, 0.0, 0.0, 0.0, 1.0, 1.0],
    "form": [1.0, 1.0, 1.0, 1.0, NAN, NAN],
    "failed": [False, False, False, False, False, True],
}


def test_every_metric_by_hand():
    found = rollout_metrics(*make(**ARGUMENTS), list, threshold=1.0)
    assert found == {
        "reward/mean": pytest.approx(4.0 / 5),  # 1.5 + 3 * 0.5 + 1 over the five that are known
        "reward/solve_rate": pytest.approx(2 / 6),  # 1.5 and 1, of all completions
        "reward/groups_with_signal": pytest.approx(1 / 3),  # the second is level, the third has one known total
        "reward/failure_ratio": pytest.approx(1 / 6),
        "completion/length_mean": pytest.approx(7.0),  # 42 / 6
        "completion/truncation_ratio": pytest.approx(2 / 6),
        "reward/accuracy/mean": pytest.approx(3 / 6),
        "reward/form/mean": pytest.approx(4 / 4),
        "reward/std": pytest.approx((4.0 / 5 - 0.64) ** 0.5),  # squares: 2.25 + 3 * 0.25 + 1 = 4
        "completion/tokens": 42.0,
    }


def test_the_split_over_ranks_does_not_enter():
    halves = [{name: values[s] for name, values in ARGUMENTS.items()} for s in (slice(4), slice(4, 6))]
    sums = []
    for half in halves:
        rollout_metrics(*make(**half), lambda values: sums.append(values) or values, threshold=1.0)
    both = [a + b for a, b in zip(*sums, strict=True)]
    for half in halves:
        found = rollout_metrics(*make(**half), lambda _: both, threshold=1.0)
        assert found == pytest.approx(rollout_metrics(*make(**ARGUMENTS), list, threshold=1.0), rel=1e-14)


def test_a_mean_of_nothing_is_zero():
    nothing = {"accuracy": [NAN, NAN], "form": [NAN, NAN], "failed": [True, True]}
    found = rollout_metrics(*make(lengths=[1, 1], truncated=[True, True], **nothing), list, threshold=1.0)
    names = ("reward/mean", "reward/std", "reward/accuracy/mean", "reward/solve_rate", "reward/groups_with_signal")
    assert [found[name] for name in names] == [0.0] * 5
    assert found["reward/failure_ratio"] == 1.0


def test_equal_rewards_have_a_deviation_of_zero_whatever_the_rounding():
    # In fp64 the mean of the squares of six times 0.7 is 1.7e-16 below the square of their mean.
    level = {"accuracy": [0.7] * 6, "form": [NAN] * 6, "failed": [False] * 6}
    found = rollout_metrics(*make(lengths=[1] * 6, truncated=[True] * 6, **level), list, threshold=1.0)
    assert found["reward/std"] == 0.0
