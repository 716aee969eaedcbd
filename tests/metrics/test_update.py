import pytest
import torch

from grpo_lightning.metrics import UpdateStatistics
from grpo_lightning.types import LossOutput, Statistic


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def output(*, parts=None, lowest=None, highest=None, values=None, **statistics):
    """Of (sum, count) pairs by name; `_` stands for `/`."""
    return LossOutput(
        torch.zeros(()),
        {name.replace("_", "/", 1): Statistic(scalar(s), scalar(c)) for name, (s, c) in statistics.items()},
        *({name: scalar(v) for name, v in (given or {}).items()} for given in (parts, lowest, highest)),
        {name: torch.tensor(v) for name, v in (values or {}).items()},
    )


def taken(*outputs, gather=lambda rows: rows):
    statistics = UpdateStatistics()
    for each in outputs:
        statistics.add(each)
    return statistics.take(gather)


def test_micro_batches_are_weighted_by_their_counts():
    found = taken(output(policy_entropy=(3.0, 3.0)), output(policy_entropy=(5.0, 1.0)))
    assert found == {"policy/entropy": 2.0}  # (3 + 5) / (3 + 1); the mean of the means would be 3


def test_parts_of_the_loss_add_up_and_bounds_stay_bounds():
    first = output(x_y=(1.0, 1.0), parts={"train/loss": 0.25}, lowest={"r_min": 0.5}, highest={"r_max": 1.5})
    second = output(x_y=(1.0, 1.0), parts={"train/loss": -1.0}, lowest={"r_min": 0.7}, highest={"r_max": 2.0})
    assert taken(first, second) == {"train/loss": -0.75, "x/y": 1.0, "r_min": 0.5, "r_max": 2.0}


def test_quantiles_are_over_the_tokens_of_all_micro_batches():
    nan = float("nan")
    first, second = ([3.0, nan, 1.0], [5.0, 2.0, 4.0, nan])
    found = taken(*(output(x_y=(1.0, 1.0), values={"h": values}) for values in (first, second)))
    # 1 to 5: the places 0.4, 2 and 3.6.
    assert found == {"x/y": 1.0, "h_p10": pytest.approx(1.4), "h_p50": 3.0, "h_p90": pytest.approx(4.6)}


def test_the_next_update_begins_anew():
    statistics = UpdateStatistics()
    statistics.add(output(policy_entropy=(3.0, 3.0)))
    statistics.take(lambda rows: rows)
    assert statistics.take(lambda rows: rows) == {}
    statistics.add(output(policy_entropy=(7.0, 1.0)))
    assert statistics.take(lambda rows: rows) == {"policy/entropy": 7.0}


def test_what_has_no_tokens_is_not_logged():
    assert taken(output(policy_kl=(0.0, 0.0), policy_ratio=(2.0, 2.0))) == {"policy/ratio": 1.0}
    bounds = {"lowest": {"r_min": float("inf")}, "highest": {"r_max": float("-inf")}, "values": {"h": [float("nan")]}}
    assert taken(output(policy_kl=(0.0, 0.0), parts={"train/loss": 0.0}, **bounds)) == {}


def test_an_infinite_statistic_stays_infinite():
    found = taken(output(policy_ratio=(float("inf"), 1.0)), output(policy_ratio=(1.0, 1.0)))
    assert found == {"policy/ratio": float("inf")}


def test_ranks_are_put_together_name_by_name():
    """The other rank tells of one token of entropy 5, which is its lowest, and of none of `mine`."""
    bounds = {"lowest": {"h_min": 1.0}, "highest": {"h_max": 1.0}, "parts": {"train/loss": 1.0}}
    here = output(mine_x=(1.0, 1.0), policy_entropy=(3.0, 3.0), values={"h": [1.0, 1.0, 1.0]}, **bounds)
    asked = []

    def gather(rows):
        asked.append(rows)
        replies = [[[0.0, 5.0]], [[0.0, 1.0]], [[2.0]], [[5.0]], [[5.0]], [5.0]]
        return torch.cat([rows, torch.tensor(replies[len(asked) - 1], dtype=torch.float64)])

    found = taken(here, gather=gather)
    assert found == {
        "train/loss": 3.0,
        "mine/x": 1.0,
        "policy/entropy": 2.0,  # (3 + 5) / (3 + 1)
        "h_min": 1.0,
        "h_max": 5.0,
        "h_p10": 1.0,
        "h_p50": 1.0,
        "h_p90": pytest.approx(1 + 0.7 * 4),  # of 1, 1, 1, 5: place 2.7
    }


def test_squares_are_reported_as_what_they_are_good_for():
    # Ratios 0.5 and 1.5: (x - 1)^2 is 0.25 twice. Weights 0, 1 and 2: 1, 0 and 1; (0 + 1 + 2)^2 / (3 * 5), 5/3 - 1.
    found = taken(
        output(
            policy_ratio=(2.0, 2.0),
            policy_ratio_square=(0.5, 2.0),
            sampler_weight=(3.0, 3.0),
            sampler_weight_square=(2.0, 3.0),
            sampler_correction=(2.0, 2.0),  # 2 and 0
            sampler_correction_square=(2.0, 2.0),
        )
    )
    assert found == {
        "policy/ratio": 1.0,
        "policy/ratio_std": 0.5,
        "sampler/weight": 1.0,
        "sampler/weight_std": pytest.approx((2 / 3) ** 0.5),
        "sampler/chi_square": pytest.approx(2 / 3),
        "sampler/effective_sample_size": pytest.approx(0.6),
        "sampler/correction": 1.0,
        "sampler/correction_std": 1.0,
        "sampler/correction_effective_sample_size": 0.5,
    }
