"""Micro-batches in pieces where every forward needs all ranks: as many on each, and the gradient of one process."""

from importlib.util import find_spec

import pytest
import replay
import torch

# Ragged completions; there is nothing to learn from the prompts of odd index, so that some micro-batches of a rank have
# fewer samples than the other's have pieces, or none. The reference, clipping, two updates per rollout, accumulation.
SETTINGS = {"num_epochs": 2, "accumulate": 2, "iterations": 4, "fails_on_odd": True}
IN_PIECES = {**SETTINGS, "max_tokens": 20}
ADAPTER = {"lora": {"rank": 3}, "layout": "padded"}
SAVED_AT = 4 * 2 + 2  # micro-batches: in the middle of the third iteration
UPDATES_AFTER = 3
ZERO = {"stage": 3, "zero_settings": {"stage3_param_persistence_threshold": 0}}
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(({"strategy": "fsdp2"}, 1e-6), id="fsdp2"),
        pytest.param(({"zero": ZERO}, 5e-6), id="deepspeed_3", marks=NEEDS_DEEPSPEED),
    ],
)
def world(request, tmp_path_factory):
    """The runs in pieces: of all weights, resumed, and of an adapter; and the tolerance of their gradients."""
    strategy, tolerance = request.param
    folder = tmp_path_factory.mktemp("pieces")
    path = str(folder / "middle.ckpt")
    runs = [
        {**strategy, **IN_PIECES, "save_at": [(SAVED_AT, path)]},
        {**strategy, **IN_PIECES, "ckpt_path": path},
        {**strategy, **IN_PIECES, **ADAPTER},
    ]
    return [of_ranks[0] for of_ranks in replay.in_world(folder / "world", runs, ranks=2)], tolerance


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "settings"), [(0, SETTINGS), (2, SETTINGS | ADAPTER)], ids=["all", "adapter"])
def test_gradients_and_metrics_are_those_of_one_process_without_a_limit(world, number, settings):
    runs, tolerance = world
    record, _ = replay.run(**settings)
    mine = runs[number]
    assert len(mine["gradients"]) == len(record.gradients) == 8
    assert relative(mine["gradients"][0], record.gradients[0]) < tolerance
    moved = record.weights[-1] - record.weights[0]
    # Adam amplifies rounding where a gradient is nearly zero.
    assert float((mine["weights"][-1] - record.weights[-1]).norm() / moved.norm()) < 1e-4
    for found, expected in zip(mine["metrics"], record.metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_an_iteration_goes_on_in_pieces_bit_for_bit(world):
    (whole, resumed, _), _ = world
    assert len(resumed["weights"]) == UPDATES_AFTER
    assert all(map(torch.equal, resumed["weights"], whole["weights"][-UPDATES_AFTER:]))
