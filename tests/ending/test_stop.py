"""A run that is asked to stop at any moment goes on bit for bit."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import replay
import torch
import worlds
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from grpo_lightning.ending import StoppedRun
from grpo_lightning.rollout import InProcessEngine

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

SETTINGS = {"live": True, "num_epochs": 2, "accumulate": 2, "iterations": 4, "enable_checkpointing": True}
MOMENTS = ["before anything", "rollout", "score", "first micro-batch", "second micro-batch", "validation", "last save"]
VALIDATION = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
NUM_UPDATES = 8


class AskToStop(Callback):
    """Sends this process a signal, once, on the ranks that are asked."""

    def __init__(self, moment, ranks=(0,), signum=signal.SIGTERM):
        self.moment, self.ranks, self.signum = moment, ranks, signum
        self.is_over = False

    def at(self, moment, trainer, module, *, iteration=2):
        is_now = moment == self.moment and module.iteration == iteration and not self.is_over
        if is_now:
            self.is_over = True
            if trainer.global_rank in self.ranks:
                os.kill(os.getpid(), self.signum)

    def setup(self, trainer, pl_module, stage):
        score, generate = self.reward(trainer).score, InProcessEngine.generate
        self.is_second_batch = False

        def scored(*arguments):
            self.at("score", trainer, pl_module)
            return score(*arguments)

        def drawn(engine, requests, *arguments):
            completions = generate(engine, requests, *arguments)
            self.at("validation" if trainer.validating and self.is_second_batch else "rollout", trainer, pl_module)
            return completions

        self.reward(trainer).score = scored
        pl_module.engine.generate = drawn.__get__(pl_module.engine)

    def reward(self, trainer):
        return next(c for c in trainer.callbacks if isinstance(c, replay.TokenSum))

    def on_train_start(self, trainer, pl_module):
        self.at("before anything", trainer, pl_module, iteration=0)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.is_second_batch = batch_idx == 1

    def on_before_backward(self, trainer, pl_module, loss):
        tick = pl_module._tick
        if tick.update == 1:
            self.at(["first micro-batch", "second micro-batch"][tick.microbatch], trainer, pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.at("last save", trainer, pl_module, iteration=3)


def run(folder, *, callbacks=(), ckpt_path=None, every=100, save_last=True, **settings):
    """The weights and metrics of each update of this process's run."""
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=every, save_last=save_last, save_top_k=-1)
    module, data, trainer, record = replay.make(
        callbacks=[checkpoints, *callbacks], default_root_dir=folder, **{**SETTINGS, **settings}
    )
    data.evaluation_batch_size = 3
    with suppress(StoppedRun):
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return record


def assert_goes_on(stopped, resumed, straight):
    """Together the parts make every update once, and each as it was."""
    assert len(stopped.weights) + len(resumed.weights) == NUM_UPDATES
    assert all(map(torch.equal, stopped.weights + resumed.weights, straight.weights))
    assert stopped.metrics + resumed.metrics == straight.metrics


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"), **VALIDATION)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, straight, moment):
    ask = AskToStop(moment)
    stopped = run(tmp_path, callbacks=[ask], every=6, **VALIDATION)
    assert ask.is_over
    assert (tmp_path / "last.policy" / "config.json").is_file()
    resumed = run(tmp_path, ckpt_path="last", every=6, **VALIDATION)
    assert_goes_on(stopped, resumed, straight)
    assert list(tmp_path.glob("last*.ckpt")) == [tmp_path / "last.ckpt"], "the run writes over its own"


@pytest.mark.parametrize(
    ("moment", "num_updates"), [("rollout", 4), ("first micro-batch", 5), ("second micro-batch", 6)]
)
def test_what_is_broken_off_is_at_most_a_rollout(tmp_path, moment, num_updates):
    assert len(run(tmp_path, callbacks=[AskToStop(moment)]).weights) == num_updates


def test_a_validation_that_was_broken_off_is_made_whole(tmp_path):
    """Two batches of three prompts: the second alone would be another accuracy."""

    class Held(Callback):
        def __init__(self):
            self.accuracies = []

        def on_validation_end(self, trainer, pl_module):
            self.accuracies.append((trainer.global_step, *map(float, pl_module_metrics(trainer).values())))

    def pl_module_metrics(trainer):
        return {k: v for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("validation/")}

    straight, stopped, resumed = Held(), Held(), Held()
    run(tmp_path / "straight", callbacks=[straight], **VALIDATION)
    ask = AskToStop("validation")
    run(tmp_path / "parts", callbacks=[stopped, ask], **VALIDATION)
    assert ask.is_over
    run(tmp_path / "parts", callbacks=[resumed], ckpt_path="last", **VALIDATION)
    assert len(straight.accuracies) == 4
    assert len(straight.accuracies[0]) > 1
    assert stopped.accuracies + resumed.accuracies == straight.accuracies


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_status_names_the_signal(tmp_path, signum, status):
    module, data, trainer, _ = replay.make(callbacks=[AskToStop("rollout", signum=signum)], live=True, iterations=4)
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(module, data)
    assert stopped.value.code == status
    assert signal.getsignal(signum) is before


def test_a_run_without_checkpoints_says_that_nothing_was_saved(tmp_path, caplog):
    run(tmp_path, callbacks=[AskToStop("rollout")], fast_dev_run=12)
    assert "Nothing was saved" in caplog.text
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_link_to_another_checkpoint_is_replaced_and_not_followed(tmp_path):
    run(tmp_path, callbacks=[AskToStop("second micro-batch")], every=4, save_last="link")
    (other,) = tmp_path.glob("epoch*step=4.ckpt")
    assert torch.load(other)["global_step"] == 4
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 6
    assert not (tmp_path / "last.ckpt").is_symlink()


# Two ranks


def told(record):
    return {"weights": record.weights, "metrics": record.metrics}


def rank_of_world(folder, strategy, cases):
    """Runs that go straight, and for each case one that is stopped and goes on."""
    rank = os.environ["LOCAL_RANK"]
    common = {"strategy": strategy, "ranks": 2}
    torch.save(told(run(folder / "straight", **common)), folder / f"straight.{rank}")
    for i, (moment, asked) in enumerate(cases):
        stopped = run(folder / f"{i}", callbacks=[AskToStop(moment, asked)], **common)
        resumed = run(folder / f"{i}", ckpt_path="last", **common)
        torch.save([told(stopped), told(resumed)], folder / f"case.{i}.{rank}")


CASES = {
    "ddp": [("rollout", (1,)), ("score", (0,)), ("first micro-batch", (1,)), ("second micro-batch", (0, 1))],
    "fsdp2": [("rollout", (0,)), ("first micro-batch", (1,)), ("score", (0, 1))],
    "deepspeed_2": [("rollout", (1,)), ("first micro-batch", (0,))],
    "deepspeed_3": [("rollout", (0, 1)), ("second micro-batch", (1,))],
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", CASES)
def test_two_ranks_stop_together_whoever_is_asked(tmp_path, strategy):
    worlds.launch(rank_of_world, tmp_path / "world", strategy, CASES[strategy], num_ranks=2)
    for rank in range(2):
        straight = torch.load(tmp_path / "world" / f"straight.{rank}")
        for i in range(len(CASES[strategy])):
            stopped, resumed = torch.load(tmp_path / "world" / f"case.{i}.{rank}")
            assert 0 < len(stopped["weights"]) < NUM_UPDATES
            assert len(stopped["weights"]) + len(resumed["weights"]) == NUM_UPDATES
            assert all(map(torch.equal, stopped["weights"] + resumed["weights"], straight["weights"]))
            assert stopped["metrics"] + resumed["metrics"] == straight["metrics"]
            assert Path(tmp_path / "world" / f"{i}" / "last.ckpt").is_file()
