"""No split changes a metric: an objective with every part on, two updates per rollout, on one recorded rollout."""

import pytest
import replay
import torch

from grpo_lightning.metrics import update

SETTINGS = {"objective": "everything", "dtype": "float64", "num_epochs": 2, "num_solved_in_seven": 4}
# The first update is of the same weights. Those of the others differ by rounding that Adam amplifies.
FIRST, LATER = {"rel": 1e-11, "abs": 1e-12}, {"rel": 1e-6, "abs": 1e-8}


@pytest.fixture(scope="module")
def whole():
    return replay.run(**SETTINGS, iterations=2)[0].metrics


def assert_same(metrics, whole):
    assert len(metrics) == len(whole) == 4
    for i, (mine, theirs) in enumerate(zip(metrics, whole, strict=True)):
        assert mine == pytest.approx(theirs, **(LATER if i else FIRST))


@pytest.mark.filterwarnings("ignore:model.max_tokens_per_microbatch is")
@pytest.mark.parametrize("split", [{"accumulate": 4}, {"accumulate": 16}, {"max_tokens": 20}], ids=str)
def test_micro_batches(whole, split):
    assert_same(replay.run(**SETTINGS, **split, iterations=2)[0].metrics, whole)


def test_two_ranks(whole, tmp_path):
    for of_rank in replay.two_ranks(tmp_path, **SETTINGS, accumulate=2, iterations=2):
        assert_same(of_rank["metrics"], whole)


def test_the_mean_of_micro_batches_means_would_not_pass(whole, monkeypatch):
    """The control: every statistic divided by its own count before it is added up."""
    add = update.UpdateStatistics.add

    def add_means(self, output):
        means = {name: type(s)(s.sum / s.count, torch.ones(())) for name, s in output.statistics.items()}
        add(self, output._replace(statistics=means))

    monkeypatch.setattr(update.UpdateStatistics, "add", add_means)
    metrics = replay.run(**SETTINGS, accumulate=4, iterations=2)[0].metrics
    with pytest.raises(AssertionError):
        assert_same(metrics, whole)
