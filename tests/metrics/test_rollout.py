from dataclasses import replace

import pytest
import torch

from grpo_lightning.metrics import learning_metrics, rollout_metrics
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
            weight_version=6 if cut else 3,
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


def of(arguments, gather=lambda rows: rows):
    return rollout_metrics(*make(**arguments), gather, 1.0, 2, version=7)


def test_every_metric_by_hand():
    assert of(ARGUMENTS) == {
        "reward/mean": pytest.approx(4.0 / 5),  # 1.5 + 3 * 0.5 + 1 over the five that are known
        "reward/std": pytest.approx((4.0 / 5 - 0.64) ** 0.5),  # squares: 2.25 + 3 * 0.25 + 1 = 4
        "reward/accuracy/mean": pytest.approx(3 / 6),
        "reward/accuracy/std": pytest.approx(0.5),
        "reward/form/mean": pytest.approx(4 / 4),
        "reward/form/std": 0.0,
        "reward/solve_rate": pytest.approx(2 / 6),  # 1.5 and 1, of all completions
        "reward/failure_ratio": pytest.approx(1 / 6),
        "reward/group_std": pytest.approx(0.5 / 3),  # 1.5 and 0.5; twice 0.5; 1 alone
        "reward/groups_with_signal": pytest.approx(1 / 3),  # the second is level, the third has one known total
        "reward/groups_all_right": pytest.approx(1 / 3),  # the third
        "reward/groups_all_wrong": pytest.approx(1 / 3),  # the second
        "reward/pass_rate/none": pytest.approx(1 / 3),
        "reward/pass_rate/to_25": 0.0,
        "reward/pass_rate/to_50": pytest.approx(1 / 3),  # one of two
        "reward/pass_rate/to_75": 0.0,
        "reward/pass_rate/below_all": 0.0,
        "reward/pass_rate/all": pytest.approx(1 / 3),  # one of the one that is known
        "reward/num_rounds": 2.0,
        "completion/tokens": 42.0,
        "completion/length_mean": pytest.approx(7.0),  # 42 / 6
        "completion/length_min": 2.0,
        "completion/length_max": 12.0,
        "completion/length_p95": pytest.approx(11.5),  # place 0.95 * 5 = 4.75, between 10 and 12
        "completion/truncation_ratio": pytest.approx(2 / 6),
        "completion/terminated_length_mean": pytest.approx(5.0),
        "completion/terminated_length_min": 2.0,
        "completion/terminated_length_max": 8.0,
        "completion/right_length_mean": pytest.approx(6.0),  # 2 and 10
        "completion/wrong_length_mean": pytest.approx(6.0),  # 4, 6 and 8; of the last nothing is known
        "prompt/length_mean": 1.0,
        "sampler/staleness": pytest.approx(3.0),  # four times 7 - 3 and twice 7 - 6
        "sampler/staleness_max": 4.0,
    }


@pytest.mark.parametrize(
    ("num_right", "bin_"), [(0, "none"), (1, "to_25"), (2, "to_50"), (3, "to_75"), (5, "below_all"), (6, "all")]
)
def test_the_histogram_of_pass_rates(num_right, bin_):
    # Of six: 1/6 is in (0, 1/4], 2/6 in (1/4, 1/2], 3/6 too.
    right = [1.0] * num_right + [0.0] * (6 - num_right)
    bin_ = "to_50" if num_right == 3 else bin_
    rollout, rewards = make([1] * 6, [False] * 6, right, [NAN] * 6, [False] * 6)
    one_group = replace(rollout, prompts=rollout.prompts[:1], slots=(0,))
    found = rollout_metrics(one_group, rewards, lambda rows: rows, 1.0, 1, version=0)
    histogram = {name: share for name, share in found.items() if name.startswith("reward/pass_rate/")}
    assert histogram.pop(f"reward/pass_rate/{bin_}") == 1.0
    assert set(histogram.values()) == {0.0}
    assert len(histogram) == 5


def test_the_split_over_ranks_does_not_enter():
    halves = [{name: values[s] for name, values in ARGUMENTS.items()} for s in (slice(4), slice(4, 6))]
    rows = []
    for half in halves:
        of(half, lambda mine: rows.append(mine) or mine)
    for half in halves:
        assert of(half, lambda _: torch.cat(rows)) == of(ARGUMENTS)


def test_a_mean_of_nothing_is_zero_and_a_bound_of_nothing_is_left_out():
    nothing = {"accuracy": [NAN, NAN], "form": [NAN, NAN], "failed": [True, True]}
    found = of({"lengths": [1, 1], "truncated": [True, True], **nothing})
    names = ("reward/mean", "reward/std", "reward/accuracy/mean", "reward/solve_rate", "reward/groups_with_signal")
    assert [found[name] for name in names] == [0.0] * 5
    assert found["reward/failure_ratio"] == 1.0
    assert found["reward/groups_all_right"] == found["reward/groups_all_wrong"] == 0.0
    assert not {"completion/terminated_length_mean", "completion/right_length_mean"} & set(found)


def test_equal_rewards_have_a_deviation_of_zero_whatever_the_rounding():
    level = {"accuracy": [0.7] * 6, "form": [NAN] * 6, "failed": [False] * 6}
    found = of({"lengths": [1] * 6, "truncated": [True] * 6, **level})
    assert found["reward/std"] == pytest.approx(0.0, abs=1e-15)  # a mean of six times 0.7 is rounded


def test_what_there_is_to_learn_from_by_hand():
    advantages, learned = torch.tensor([1.0, -1.0, 0.0, 3.0]), torch.tensor([True, True, True, False])
    assert learning_metrics(advantages, learned, lambda rows: rows) == {
        "completion/learned_ratio": 3 / 4,
        "advantage/nonzero_ratio": 2 / 4,
        "advantage/min": -1.0,
        "advantage/max": 1.0,
        "advantage/std": pytest.approx((2 / 3) ** 0.5),
    }
    nothing = learning_metrics(advantages, learned & False, lambda rows: rows)
    assert nothing == {"completion/learned_ratio": 0.0, "advantage/nonzero_ratio": 0.0}
