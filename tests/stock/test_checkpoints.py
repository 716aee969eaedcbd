"""Callbacks that save."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint, model_checkpoint
from stock.matrix import shows
from stock.runs import exported, fit, flat, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
SAVES = {"enable_checkpointing": True}


def names(folder):
    """All but the manifests, of which each checkpoint has one."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".manifest.json"))


def load(path):
    return torch.load(path, weights_only=True)


@shows("Callbacks", "ModelCheckpoint: monitor, save_top_k")
def test_the_best_checkpoints_stay_with_their_policies(tmp_path, claim):
    plain, _, _ = fit(iterations=6)
    rewards = [metrics["reward/mean"] for metrics in plain.metrics]
    best = sorted(range(1, 7), key=lambda step: rewards[step - 1])[-2:]
    callback = ModelCheckpoint(
        tmp_path, "{step}", monitor="reward/mean", mode="max", save_top_k=2, every_n_train_steps=1
    )
    fit(iterations=6, callbacks=[callback], **SAVES)
    assert names(tmp_path) == sorted(f"step={step}.{kind}" for step in best for kind in ("ckpt", "policy"))
    assert float(callback.best_model_score) == pytest.approx(max(rewards))
    assert callback.best_model_path == str(tmp_path / f"step={best[-1]}.ckpt")
    for step in best:
        assert torch.equal(flat(load(tmp_path / f"step={step}.ckpt")["state_dict"]), plain.weights[step - 1])
    claim.works(
        "`reward/mean` over six updates, the best two kept: their files and beside each its exported policy, all "
        "others removed with theirs, the best score that of the run"
    )


@shows("Callbacks", "ModelCheckpoint: every_n_train_steps, save_last")
def test_the_last_checkpoint_is_that_of_the_last_save(tmp_path, claim):
    callback = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    record, _, _ = fit(iterations=5, callbacks=[callback], accumulate=2, **SAVES)
    saved = [f"{name}.{kind}" for name in ("last", "step=2", "step=4") for kind in ("ckpt", "policy")]
    assert names(tmp_path) == sorted(saved)
    last = load(tmp_path / "last.ckpt")
    assert last["global_step"] == 4
    assert torch.equal(flat(last["state_dict"]), record.weights[3])
    policy = exported(tmp_path / "last.policy")
    assert all(torch.equal(weight, last["state_dict"][f"policy.model.{name}"]) for name, weight in policy.items())
    claim.works(
        "every two of five updates of two micro-batches each: saved after updates 2 and 4, the last one with the "
        "weights after update 4 and its exported policy; optimizer steps are counted, not micro-batches"
    )


@shows("Callbacks", "ModelCheckpoint: train_time_interval")
def test_a_checkpoint_by_the_clock_is_of_a_whole_update(tmp_path, monkeypatch, claim):
    clock = iter(range(1000))
    monkeypatch.setattr(model_checkpoint, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    callback = ModelCheckpoint(tmp_path, "{step}", train_time_interval=timedelta(seconds=3), save_top_k=-1)
    settings = {"iterations": 5, "accumulate": 2}
    whole, _, _ = fit(callbacks=[callback], **settings, **SAVES)
    # A second per micro-batch: due at the third, sixth and ninth, of which the first falls inside the second update.
    assert names(tmp_path) == sorted(f"step={s}.{kind}" for s in (1, 3, 4) for kind in ("ckpt", "policy"))
    rest, _, _ = fit(ckpt_path=tmp_path / "step=1.ckpt", **settings)
    assert same(rest.weights, whole.weights[1:])
    claim.works(
        "due inside an accumulation window: the checkpoint is of the update before, and a run resumed from it has "
        "bitwise the weights of the one that went on"
    )


class BreaksOff(Callback):
    """In the middle of the third update."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.epoch_loop.total_batch_idx == 5:
            raise RuntimeError("pulled the plug")


@shows("Callbacks", "OnExceptionCheckpoint")
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
def test_a_run_that_broke_off_goes_on_where_it_was(tmp_path, claim):
    settings = {"iterations": 5, "accumulate": 2}
    whole, _, _ = fit(**settings)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(callbacks=[OnExceptionCheckpoint(tmp_path), BreaksOff()], **settings, **SAVES)
    assert names(tmp_path) == ["on_exception.ckpt", "on_exception.policy"]
    for resumed in ({"ckpt_path": tmp_path / "on_exception.ckpt"}, {"callbacks": [OnExceptionCheckpoint(tmp_path)]}):
        rest, _, _ = fit(**resumed, **settings, **SAVES, default_root_dir=tmp_path / "rest")
        assert same(rest.weights, whole.weights[2:])
    claim.works(
        "an error in the middle of update 3 of 5: `on_exception.ckpt` and its exported policy; the next `fit` with "
        "this callback goes on from it by itself, with bitwise the weights of a run that nothing befell"
    )
