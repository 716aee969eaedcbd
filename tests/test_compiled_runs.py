"""Runs whose blocks are compiled: the numbers of those that are not, under every strategy that takes them."""

from importlib.util import find_spec

import pytest
import replay
import torch
from replay import SaveAt

from grpo_lightning.policy.compilation import _has_cpp_compiler
from grpo_lightning.types import ConfigurationError

# Of torch's tracer itself, which looks at all that a tensor has, and makes instances of autograd's functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

SETTINGS = {"num_epochs": 2, "accumulate": 2, "iterations": 3, "live": True}
AOT = {"backend": "aot_eager"}
TOLERANCE = 1e-6  # the same sums, in another order


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def assert_same(mine, theirs, tolerance=TOLERANCE):
    for a, b in zip(mine["gradients"], theirs["gradients"], strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance
    moved = theirs["weights"][-1] - theirs["weights"][0]
    assert float((mine["weights"][-1] - theirs["weights"][-1]).norm() / moved.norm()) < 1e-4


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2}}], ids=str)
@pytest.mark.parametrize("layout", replay.LAYOUTS)
def test_the_numbers_are_those_of_a_run_without(layout, more):
    settings = {**SETTINGS, "layout": layout, **more}
    usual, _ = replay.run(**settings)
    compiled, _ = replay.run(**settings, compiled=AOT)
    assert num_graphs() > 0
    assert_same(vars(compiled), vars(usual))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not _has_cpp_compiler(), reason="inductor needs a C++ compiler on a CPU")
def test_kernels_have_the_numbers_of_a_run_without():
    usual, _ = replay.run(**SETTINGS)
    compiled, _ = replay.run(**SETTINGS, compiled={"backend": "inductor"})
    assert torch._inductor.metrics.generated_kernel_count > 0
    assert_same(vars(compiled), vars(usual), tolerance=1e-5)  # the kernels have an exponential function of their own


def test_rollouts_are_not_compiled(monkeypatch):
    """The engine decodes with buffers that grow; each of their sizes would be compiled for itself."""
    graphs = []
    engine = replay.InProcessEngine.generate

    def generate(self, *args):
        before = num_graphs()
        completions = engine(self, *args)
        graphs.append(num_graphs() - before)
        return completions

    monkeypatch.setattr(replay.InProcessEngine, "generate", generate)
    replay.run(live=True, iterations=2, compiled={"backend": "eager"})
    assert graphs == [0, 0]
    assert num_graphs() > 0


def test_checkpoints_are_those_of_a_run_without(tmp_path):
    """A run goes on compiled, and one that was compiled goes on without."""
    settings = {"iterations": 3}
    save = {name: SaveAt(1, tmp_path / f"{name}.ckpt") for name in ("usual", "compiled")}
    usual, _ = replay.run(**settings, callbacks=[save["usual"]])
    compiled, _ = replay.run(**settings, callbacks=[save["compiled"]], compiled={"backend": "eager"})
    names = [list(torch.load(tmp_path / f"{name}.ckpt")["state_dict"]) for name in save]
    assert names[0] == names[1]
    for name, then in (("usual", {"backend": "eager"}), ("compiled", None)):
        module, data, trainer, record = replay.make(**settings, compiled=then)
        trainer.fit(module, data, ckpt_path=tmp_path / f"{name}.ckpt")
        assert_same(vars(record), {"gradients": usual.gradients[-2:], "weights": usual.weights[-2:]})
    assert_same(vars(compiled), vars(usual))


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path):
    usual, _ = replay.run(**{**SETTINGS, "iterations": 5})
    settings = {**SETTINGS, "iterations": 5, "compiled": AOT}
    runs = [
        {**settings, **more, **again}
        for more in ({"strategy": "ddp"}, {"strategy": "fsdp2"})
        for again in ({}, {"gradient_checkpointing": True})
    ]
    if find_spec("deepspeed") is not None:
        runs.append({**settings, "zero": {"stage": 2}})
    for (first, _), run in zip(replay.in_world(tmp_path, runs, ranks=2), runs, strict=True):
        assert first["graphs"] > 0, run
        # Later ones are those of weights that Adam has let rounding come into.
        assert_same({**first, "gradients": first["gradients"][:1]}, {**vars(usual), "gradients": usual.gradients[:1]})


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
def test_hooks_inside_the_blocks_are_refused():
    module, data, trainer, _ = replay.make(ranks=1, strategy="deepspeed_3", compiled=AOT)
    with pytest.raises(ConfigurationError, match=r"model\.compile must be null under trainer\.strategy: deepspeed_3"):
        trainer.fit(module, data)


def test_a_missing_compiler_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("grpo_lightning.policy.compilation._has_cpp_compiler", lambda: False)
    module, data, trainer, _ = replay.make(compiled={})
    monkeypatch.setattr(module.source, "load_model", lambda **_: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError, match=r"model\.compile\.backend"):
        trainer.fit(module, data)
