import torch

from grpo_lightning.metrics.reduction import Total, mean_of, over_ranks
from grpo_lightning.types import Statistic


def test_a_mean_is_a_sum_and_a_count():
    assert mean_of(torch.tensor([1.0, 2.0, 6.0])) == Statistic(torch.tensor(9.0), torch.tensor(3.0))
    assert mean_of(torch.tensor([True, False])) == Statistic(torch.tensor(1.0), torch.tensor(2.0))
    assert mean_of(torch.tensor([])) == Statistic(torch.tensor(0.0), torch.tensor(0.0))


def test_sums_are_in_fp64():
    many = torch.full((3,), 2**24 + 1, dtype=torch.int64)  # the first whole number that fp32 does not have
    assert mean_of(many).sum.item() == 3 * (2**24 + 1)


def test_ranks_are_added_up_in_one_call_and_not_averaged():
    other_rank = [10.0, 1.0, 0.0, 0.0]
    calls = []

    def sum_over_ranks(values):
        calls.append(values)
        return [a + b for a, b in zip(values, other_rank, strict=True)]

    local = {"length": mean_of(torch.tensor([2.0, 3.0, 4.0])), "share": mean_of(torch.tensor([True, False]))}
    # 2 + 3 + 4 + 10 over 3 + 1 values: 4.75, where the mean of the ranks' means would be 6.5.
    assert over_ranks(local, sum_over_ranks) == {"length": Total(19.0, 4.0), "share": Total(1.0, 2.0)}
    assert calls == [[9.0, 3.0, 1.0, 2.0]]
