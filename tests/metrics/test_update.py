import pytest
import torch

from grpo_lightning.metrics import UpdateStatistics
from grpo_lightning.metrics.update import EVERY_RANK_HAS
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


def test_a_rank_without_samples_adds_as_many_values_as_the_others():
    values = {}

    def sums(rank):
        return lambda local: values.setdefault(rank, local)

    busy, idle = UpdateStatistics(), UpdateStatistics()
    busy.add({name: statistic(1.0, 2.0) for name in reversed(EVERY_RANK_HAS)})
    assert busy.take(sums("busy")) == dict.fromkeys(EVERY_RANK_HAS, 0.5)
    assert idle.take(sums("idle")) == {}
    assert values == {"busy": [1.0, 2.0] * len(EVERY_RANK_HAS), "idle": [0.0, 0.0] * len(EVERY_RANK_HAS)}


def test_ranks_are_added_up():
    statistics = UpdateStatistics()
    statistics.add({"policy/entropy": statistic(3.0, 3.0), "mine": statistic(1.0, 1.0)})
    other = [5.0, 1.0, *[0.0] * 6, 5.0, 1.0]  # entropy first, then the three others that every rank has, then mine
    found = statistics.take(lambda values: [a + b for a, b in zip(values, other, strict=True)])
    assert found == {"policy/entropy": pytest.approx(2.0), "mine": pytest.approx(3.0)}
