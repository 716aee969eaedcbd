"""Rollouts that gather weights layer by layer, under the strategies that have them in shards."""

from functools import partial
from importlib.util import find_spec

import lockstep_cases
import pytest
import replay
import torch
from lockstep_cases import CASES
from worlds import launch

# The second rank is done at once in training, where groups are drawn again, and has nothing to draw in a validation
# between two updates on the same completions.
SETTINGS = {
    "uneven": True,
    "num_epochs": 2,
    "accumulate": 2,
    "iterations": 2,
    "max_rounds": 2,
    "num_solved_in_seven": 3,
    "limit_val_batches": 1.0,
    "val_check_interval": 2,
}
RUNS = {"all": SETTINGS, "adapter": {**SETTINGS, "lora": {"rank": 3}}}
LAYERWISE = {"engine": partial(replay.UnevenEngine, gather="layerwise")}
ZERO = {"stage": 3, "zero_settings": {"stage3_param_persistence_threshold": 0}}
FSDP2 = pytest.param({"strategy": "fsdp2", "dtype": "float64"}, id="fsdp2")
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[FSDP2, pytest.param({"zero": ZERO}, id="deepspeed_3", marks=NEEDS_DEEPSPEED)])
def world(request, tmp_path_factory):
    """What each of two ranks told of each run, and the precision."""
    folder = tmp_path_factory.mktemp("lockstep")
    runs = [{**request.param, **settings, **LAYERWISE} for settings in RUNS.values()]
    launch(lockstep_cases.in_world, folder, runs, num_ranks=2)
    assert (folder / "log.0").read_text().count("weights together layer by layer, at most") == len(runs)
    told = {name: [torch.load(folder / f"run.{i}.{rank}") for rank in range(2)] for i, name in enumerate(RUNS)}
    return told, request.param.get("dtype", "float32")


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", RUNS)
def test_training_is_that_of_one_process(world, name):
    """Its tokens too: others would have other gradients."""
    told, dtype = world
    mine = told[name][0]
    record, _ = lockstep_cases.run(dtype=dtype, **RUNS[name])
    gradient, moved = {"float64": (1e-12, 1e-8), "float32": (5e-6, 1e-4)}[dtype]
    assert len(mine["gradients"]) == len(record.gradients)
    assert relative(mine["gradients"][0], record.gradients[0]) < gradient
    difference = (mine["weights"][-1] - record.weights[-1]).norm()
    assert float(difference / (record.weights[-1] - record.weights[0]).norm()) < moved
    for found, expected in zip(mine["metrics"], record.metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RUNS)
def test_each_rank_draws_what_it_draws_with_whole_weights_bit_for_bit(world, name, case):
    for rank, told in enumerate(world[0][name]):
        whole, layerwise = (told["drawn"][gather][case] for gather in ("whole", "layerwise"))
        assert layerwise == whole
        assert len(whole) == len(CASES[case].lengths[rank]) * CASES[case].num_completions


@pytest.mark.parametrize("name", RUNS)
def test_one_block_at_a_time_is_whole_beside_what_is_around_the_blocks(world, name):
    for told in world[0][name]:
        sizes, most = told["sizes"], told["most_whole"]
        assert most == {"whole": sizes["whole"], "layerwise": sizes["around"] + sizes["block"]}
