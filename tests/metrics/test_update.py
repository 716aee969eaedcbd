import pytest
import torch

from grpo_lightning.metrics import UpdateStatistics
from grpo_lightning.types import Statistic


def statistic(total, count):
    return Statistic(torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))


def test_micro_batches_are_weighted_by_their_counts():
    statistics = UpdateStatistics()
    statistics.add({"policy/entropy": statistic(3.0, 3.0)})
    statistics.add({"policy/entropy": statistic(5.0, 1.0)})
    assert statistics.take(list) == {"policy/entropy": 2.0}  # (3 + 5) / (3 + 1); the mean of the means would be 3


def test_the_next_update_begins_anew():
    statistics = UpdateStatistics()
    statistics.add({"policy/entropy": statistic(3.0, 3.0)})
    statistics.take(list)
    assert statistics.take(list) == {}
    statistics.add({"policy/entropy": statistic(7.0, 1.0)})
    assert statistics.take(list) == {"policy/entropy": 7.0}


def test_what_has_no_tokens_is_not_logged():
    statistics = UpdateStatistics()
    statistics.add({"policy/kl": statistic(0.0, 0.0), "policy/ratio": statistic(2.0, 2.0)})
    assert statistics.take(list) == {"policy/ratio": 1.0}


def test_an_infinite_statistic_stays_infinite():
    statistics = UpdateStatistics()
    statistics.add({"policy/ratio": statistic(float("inf"), 1.0)})
    statistics.add({"policy/ratio": statistic(1.0, 1.0)})
    assert statistics.take(list) == {"policy/ratio": float("inf")}


def test_ranks_are_added_up_name_by_name():
    statistics = UpdateStatistics()
    statistics.add({"policy/entropy": statistic(3.0, 3.0), "mine": statistic(1.0, 1.0)})
    other = [5.0, 1.0, 0.0, 0.0]  # mine, then entropy, on a rank without samples
    found = statistics.take(lambda values: [a + b for a, b in zip(values, other, strict=True)])
    assert found == {"policy/entropy": pytest.approx(1.0), "mine": pytest.approx(3.0)}


def test_squares_are_reported_as_what_they_are_good_for():
    statistics = UpdateStatistics()
    # Ratios 0.5 and 1.5; weights 0, 1 and 2: (0 + 1 + 2)^2 / (3 * 5)
    statistics.add({"policy/ratio": statistic(2.0, 2.0), "policy/ratio_square": statistic(2.5, 2.0)})
    statistics.add({"sampler/weight": statistic(3.0, 3.0), "sampler/weight_square": statistic(5.0, 3.0)})
    assert statistics.take(list) == {
        "policy/ratio": 1.0,
        "policy/ratio_std": 0.5,
        "sampler/weight": 1.0,
        "sampler/effective_sample_size": pytest.approx(0.6),
    }
