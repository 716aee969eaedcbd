"""No split and no layout changes the result: accumulation, pieces and ranks, on one recorded rollout.

`strategies/test_table.py` has the strategies.
"""

import pytest
import replay
import torch

from grpo_lightning.objective import Objective

# What floating point allows: sums of the same numbers in another order.
GRADIENT_TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
# Adam divides by the root of the squared gradient, which amplifies rounding where a gradient is nearly zero.
WEIGHT_TOLERANCE = {"float32": 1e-4, "float64": 1e-8}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def assert_same(record, other, dtype, start):
    assert relative(record.gradients[0], other.gradients[0]) < GRADIENT_TOLERANCE[dtype]
    update = (other.weights[-1] - start).norm()
    assert float((record.weights[-1] - other.weights[-1]).norm() / update) < WEIGHT_TOLERANCE[dtype]


def start_weights(dtype):
    model = replay.TinyPolicy(getattr(torch, dtype)).load_model(seed=3)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def whole():
    """The update in one padded piece, by dtype and number of updates."""
    runs = {}

    def get(dtype, num_epochs, **more):
        key = (dtype, num_epochs, *sorted(more.items()))
        if key not in runs:
            runs[key] = replay.run(dtype=dtype, num_epochs=num_epochs, iterations=5, layout="padded", **more)[0]
        return runs[key]

    return get


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_epochs", [1, 3])
@pytest.mark.parametrize("accumulate", [4, 16])
@pytest.mark.parametrize(
    ("aggregation", "layout"), [("sequence", "shared_prefix"), ("token", "packed"), ("token", "padded")]
)
def test_micro_batches(whole, dtype, num_epochs, accumulate, aggregation, layout):
    settings = {"num_epochs": num_epochs, "accumulate": accumulate, "aggregation": aggregation, "layout": layout}
    split, _ = replay.run(dtype=dtype, iterations=5, **settings)
    assert_same(split, whole(dtype, num_epochs, aggregation=aggregation), dtype, start_weights(dtype))


@pytest.mark.filterwarnings("ignore:model.max_tokens_per_microbatch is")
@pytest.mark.parametrize("layout", replay.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_oversized_bin_cut_into_pieces(whole, dtype, layout):
    split, _ = replay.run(dtype=dtype, num_epochs=3, iterations=5, max_tokens=20, layout=layout)
    assert_same(split, whole(dtype, 3), dtype, start_weights(dtype))


def test_the_mean_of_each_micro_batch_would_not_pass(whole, monkeypatch):
    """The control: what frameworks do that divide by local counts is off by far more than the tolerance."""
    full = whole("float64", 1)
    correct = Objective.loss

    def local_mean(self, scores, batch, counts, coefficients):
        return correct(self, scores, batch, counts._replace(sequences=len(batch.mask_BT) * 3), coefficients)

    monkeypatch.setattr(Objective, "loss", local_mean)
    split, _ = replay.run(dtype="float64", accumulate=3, iterations=1)  # four groups: some share a micro-batch
    assert relative(split.gradients[0], full.gradients[0]) > 1e-3


class Recorded:
    def __init__(self, state):
        self.gradients, self.weights = state["gradients"], state["weights"]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_epochs": 3, "accumulate": 2},
        {"num_epochs": 1, "num_minibatches": 2, "aggregation": "token", "layout": "packed"},
        {"num_epochs": 1, "max_tokens": 20},
    ],
)
def test_two_ranks(tmp_path, settings):
    first, _ = replay.two_ranks(tmp_path, dtype="float64", **settings)
    one, _ = replay.run(dtype="float64", iterations=5, **{**settings, "accumulate": 1, "layout": "padded"})
    assert_same(Recorded(first), one, "float64", start_weights("float64"))


def test_a_rank_whose_loss_tokens_are_all_masked(tmp_path):
    settings = {"dtype": "float64", "fails_on_odd": True, "num_epochs": 2}
    first, _ = replay.two_ranks(tmp_path, **settings)
    one, _ = replay.run(iterations=5, **settings)
    assert_same(Recorded(first), one, "float64", start_weights("float64"))


def test_four_ranks_two_of_which_have_no_loss_token(tmp_path):
    settings = {"dtype": "float64", "fails_on_odd": True, "aggregation": "token", "iterations": 2}
    of_ranks = replay.two_ranks(tmp_path, ranks=4, **settings)
    one, _ = replay.run(**settings)
    assert {len(state["slots"]) for state in of_ranks} == {1}
    for state in of_ranks:
        assert_same(Recorded(state), one, "float64", start_weights("float64"))
