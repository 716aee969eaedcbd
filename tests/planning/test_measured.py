"""What `plan` counts of the shards of ZeRO's stage 3, against what two ranks hold."""

from importlib.util import find_spec

import measured_states
import pytest
import replay
import torch
from worlds import launch

from grpo_lightning.planning.budget import weights_of
from grpo_lightning.planning.states import OptimizerStates, Sharding, states_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"),
]

RUNS = [(stage, precision) for stage in (3,) for precision in ("32-true", "bf16-mixed")]
TOLERANCE = 0.02  # shards are filled up, to whole elements of each tensor or to multiples of the ranks


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    launch(measured_states.rank, folder, RUNS, num_ranks=2)
    return {run: [torch.load(folder / f"held.{i}.{rank}") for rank in range(2)] for i, run in enumerate(RUNS)}


@pytest.mark.parametrize("part", ["weights", "gradients", "optimizer"])
@pytest.mark.parametrize(("stage", "precision"), RUNS)
def test_a_rank_holds_what_is_counted(held, stage, precision, part):
    module, *_ = replay.make(head_dim=32)
    model = module.source.load_model(seed=0)
    sharding = Sharding(name=f"deepspeed_{stage}", ranks=2, compute_itemsize=2 if precision == "bf16-mixed" else 4)
    counted = states_of(weights_of(model), sharding, OptimizerStates(2, 4), has_reference=False)
    for of_rank in held[stage, precision]:
        assert of_rank[part] == pytest.approx(getattr(counted, part), rel=TOLERANCE)
