"""A checkpoint of any strategy and number of ranks goes on under any other.

Right after the restore, every weight and every state of the optimizer is bitwise the saved one, by name. From there the
run goes on as the one that saved would have: bitwise where strategy and number of ranks are the same.
"""

from importlib.util import find_spec
from itertools import product

import elastic
import pytest
import torch
from transformers import AutoModelForCausalLM
from worlds import launch

from grpo_lightning.checkpointing import policy_folder, problem_of

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")

SINGLE = ("single", 1)
SAVED = [
    SINGLE,
    ("ddp", 2),
    ("fsdp2", 2),
    ("fsdp2_sharded", 2),
    ("deepspeed_1", 2),
    ("deepspeed_2", 2),
    ("deepspeed_3", 2),
    ("fsdp2", 4),
    ("deepspeed_3", 4),
]
RESUMED = SAVED
FEW = [SINGLE, ("fsdp2_sharded", 2), ("deepspeed_3", 2)]
"""By `make test-strategies`; all by `make test-strategies-all`."""

WEIGHT_TOLERANCE = 1e-4  # of the update: Adam amplifies rounding where a gradient is nearly zero


def cells(pairs):
    return [
        pytest.param(*pair, id=" to ".join(f"{s}-{n}" for s, n in pair), marks=marks({*pair} <= {*FEW}))
        for pair in pairs
    ]


def of_saved(saved):
    return [pytest.param(cell, id=f"{cell[0]}-{cell[1]}", marks=marks(cell in FEW)) for cell in saved]


def marks(is_among_few):
    return [pytest.mark.strategies_all, *([pytest.mark.strategies] if is_among_few else [])]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the ranks have: on some processors more of them sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, request):
    """All runs that the chosen tests ask for: one world for each number of ranks that saves, and one that resumes."""
    asked = [item.callspec.params for item in request.session.items if item.fspath == request.path]
    saved = {cell for params in asked if (cell := params.get("saved"))}
    pairs = {(p["saved"], p["resumed"]) for p in asked if "resumed" in p}
    return Matrix(tmp_path_factory.mktemp("elastic"), saved, pairs)


class Matrix:
    """What the runs have told.

    Args:
        folder: For all files.
        saved: The strategies, and their numbers of ranks, that save.
        pairs: Which of them goes on from which.
    """

    def __init__(self, folder, saved, pairs):
        self.paths = {cell: folder / f"{cell[0]}-{cell[1]}.ckpt" for cell in saved}
        self.saved = self._run(folder / "save", {cell: (cell, {"save": self.paths[cell]}) for cell in saved})
        self.resumed = self._run(
            folder / "resume", {pair: (pair[1], {"ckpt_path": self.paths[pair[0]]}) for pair in pairs}
        )

    def _run(self, folder, runs):
        results = {}
        for ranks in {cell[1] for cell, _ in runs.values()}:
            mine = {key: settings for key, ((_, n), settings) in sorted(runs.items()) if n == ranks}
            listed = [{**settings, "strategy": runs[key][0][0], "ranks": ranks} for key, settings in mine.items()]
            if ranks == 1:
                results |= {key: [elastic.told(**settings)] for key, settings in zip(mine, listed, strict=True)}
                continue
            world = folder.with_name(f"{folder.name}.{ranks}")
            launch(elastic.rank_of_world, world, listed, num_ranks=ranks)
            results |= {
                key: [torch.load(world / f"run.{number}.{rank}") for rank in range(ranks)]
                for number, key in enumerate(mine)
            }
        return results


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("saved", "resumed"), cells(product(SAVED, RESUMED)))
def test_weights_and_states_are_the_saved_ones_and_the_run_goes_on(matrix, saved, resumed):
    content, before, after = (
        elastic.read(matrix.paths[saved]),
        matrix.saved[saved][0],
        matrix.resumed[saved, resumed][0],
    )
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in after["held"].items())
    (states,) = (saved["state"] for saved in content["optimizer_states"])
    assert states.keys() == after["states"].keys() == {*range(len(states))}
    for number, entries in states.items():
        assert {*entries} == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, after["states"][number][name]) for name, value in entries.items())

    n = elastic.UPDATES_AFTER
    assert len(after["weights"]) == n
    tolerance = 5e-6 if "deepspeed_3" in (saved[0], resumed[0]) else 1e-6
    assert relative(after["gradients"][0], before["gradients"][-n]) < tolerance
    moved = before["weights"][-1] - before["weights"][-n]
    assert float((after["weights"][-1] - before["weights"][-1]).norm() / moved.norm()) < WEIGHT_TOLERANCE
    if saved == resumed:
        assert all(map(torch.equal, after["weights"], before["weights"][-n:]))
        assert all(map(torch.equal, after["gradients"], before["gradients"][-n:]))


@pytest.mark.parametrize("saved", of_saved(SAVED))
def test_the_checkpoint_is_whole_and_its_export_has_the_policys_logits(matrix, saved):
    assert problem_of(matrix.paths[saved]) is None
    assert matrix.paths[saved].is_dir() == (saved[0] == "fsdp2_sharded")
    model = AutoModelForCausalLM.from_pretrained(policy_folder(matrix.paths[saved]))
    with torch.no_grad():
        assert torch.equal(model(elastic.PROBE).logits, matrix.saved[saved][0]["logits"])


@pytest.mark.parametrize("saved", of_saved([cell for cell in SAVED if cell not in (SINGLE, ("ddp", 2))]))
def test_no_rank_but_the_first_holds_what_is_whole_and_none_where_each_writes_its_shards(matrix, saved):
    content = elastic.read(matrix.paths[saved])
    (states,) = (state["state"] for state in content["optimizer_states"])
    number = sum(tensor.numel() for tensor in content["state_dict"].values())
    number += sum(tensor.numel() for entries in states.values() for tensor in entries.values())
    first, *others = (rank["saved_elements"] for rank in matrix.saved[saved])
    if saved[0] == "fsdp2_sharded":
        assert all(share < 0.55 * number for share in (first, *others))
    else:
        assert (first, {*others}) == (number, {0})
