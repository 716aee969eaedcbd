"""Callbacks that watch, steer and show."""

import io
from datetime import timedelta
from types import SimpleNamespace

import pytest
import replay
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    RichModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
    timer,
)
from lightning.pytorch.loggers import CSVLogger
from stock.matrix import shows
from stock.runs import VALIDATED, fit, rows

from grpo_lightning.ending import EndTogether


@shows("Callbacks", "EarlyStopping")
def test_a_run_stops_when_it_has_not_improved_for_as_long_as_is_said(claim):
    plain, _, _ = fit(iterations=8)
    rewards = [metrics["reward/mean"] for metrics in plain.metrics]
    best, waited, expected = rewards[0], 0, None
    for step, reward in enumerate(rewards[1:], start=2):
        best, waited = (reward, 0) if reward > best else (best, waited + 1)
        if waited == 2:
            expected = step
            break
    callback = EarlyStopping("reward/mean", mode="max", patience=2)
    _, _, trainer = fit(iterations=8, callbacks=[callback], val_check_interval=1, **VALIDATED)
    assert callback.stopped_epoch >= 0
    assert trainer.global_step == expected
    claim.works(
        f"`reward/mean`, patience 2, looked at after each of eight updates: stopped after update {expected}, the "
        "second in turn that was no better than the best before"
    )


@shows("Callbacks", "LearningRateMonitor")
def test_the_learning_rate_of_every_step_is_the_schedules(tmp_path, claim):
    schedule = {"decay": "linear", "warmup_steps": 2}
    logger = CSVLogger(tmp_path, name="", version="")
    fit(iterations=6, accumulate=2, schedule=schedule, callbacks=[LearningRateMonitor("step")], logger=logger)
    logged = {row["step"]: row["lr-AdamW"] for row in rows(tmp_path) if "lr-AdamW" in row}
    # One and two thirds of the way up; then four steps from the whole to nothing.
    assert logged == pytest.approx({0: 1 / 300, 1: 2 / 300, 2: 0.01, 3: 0.0075, 4: 0.005, 5: 0.0025})
    claim.works(
        "warm-up over two updates and a linear decay over six, of two micro-batches each: the value of the schedule "
        "at each of the six steps"
    )


BAR = (
    "an epoch of three updates of two micro-batches: counted up to 6/6. Where `max_steps` alone ends the run, its "
    "total is in optimizer steps and its count in micro-batches; `TrainingProgress` counts updates"
)


class Advance(Callback):
    """Ten seconds per update."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.now += 10 if batch.ends_update else 0


@shows("Callbacks", "Timer")
def test_a_timer_stops_the_run_and_knows_its_parts(monkeypatch, claim):
    clock, callback = Advance(monkeypatch), Timer(timedelta(seconds=25))
    _, _, trainer = fit(iterations=8, callbacks=[clock, callback])
    assert trainer.global_step == 3
    assert callback.time_elapsed("train") == 30
    claim.works("25 s, at ten seconds per update: stopped after update 3, with 30 s on the clock")


@shows("Flags of the Trainer", "max_time")
def test_the_longest_time_of_a_run_holds(monkeypatch, claim):
    _, _, trainer = fit(iterations=8, callbacks=[Advance(monkeypatch)], max_time="00:00:00:15")
    assert trainer.global_step == 2
    claim.works("15 s, at ten seconds per update: stopped after update 2 of 8")


@shows("Callbacks", "DeviceStatsMonitor")
def test_what_the_machine_does_is_logged_at_every_update(tmp_path, claim):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(iterations=3, callbacks=[DeviceStatsMonitor(cpu_stats=True)], logger=logger)
    for when in ("start", "end"):
        key = f"DeviceStatsMonitor.on_train_batch_{when}/cpu_vm_percent"
        assert sum(0 < row.get(key, 0) <= 100 for row in rows(tmp_path)) == 3
    claim.works("the memory in use before and after each of three updates, between 0 and 100 %")


@shows("Callbacks", "LambdaCallback")
def test_functions_are_called_as_callbacks(claim):
    seen = []
    callback = LambdaCallback(on_before_optimizer_step=lambda trainer, module, optimizer: seen.append(module.iteration))
    fit(iterations=3, num_epochs=2, callbacks=[callback])
    assert seen == [0, 0, 1, 1, 2, 2]
    claim.works("three iterations of two updates each: called before every optimizer step, in the iteration under way")


@shows("Callbacks", "TQDMProgressBar")
def test_the_plain_bar_counts_the_micro_batches_of_an_epoch(capsys, claim):
    fit(max_epochs=1, max_steps=-1, accumulate=2, callbacks=[TQDMProgressBar()], enable_progress_bar=True)
    captured = capsys.readouterr()
    assert "6/6" in captured.out + captured.err
    assert "Epoch 0" in captured.out + captured.err
    claim.works(BAR)


@shows("Callbacks", "RichProgressBar")
@pytest.mark.filterwarnings("ignore:.*bar.*:UserWarning")
def test_the_rich_bar_counts_the_micro_batches_of_an_epoch(claim):
    text = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": text, "force_terminal": True, "width": 120})
    fit(max_epochs=1, max_steps=-1, accumulate=2, callbacks=[bar], enable_progress_bar=True)
    assert "6/6" in text.getvalue()
    claim.works(BAR)


@shows("Callbacks", "RichModelSummary")
def test_the_summary_counts_what_is_trained_and_what_is_not(capsys, claim):
    _, module, _ = fit(iterations=1, callbacks=[RichModelSummary()])
    counts = {name: sum(p.numel() for p in getattr(module, name).parameters()) for name in ("policy", "reference")}
    text = capsys.readouterr().out
    trained, frozen = (next(line for line in text.splitlines() if line.startswith(k)) for k in ("Trainable", "Non-tr"))
    assert counts["policy"] == counts["reference"]
    assert all(name in text for name in counts)
    assert trained.split()[-2:] == frozen.split()[-2:] == [f"{counts['policy'] / 1000:.1f}", "K"]
    claim.works("the policy with its parameters as trained, the reference with as many as not trained")


def test_a_stop_by_the_clock_inside_an_update_leaves_the_last_whole_one(monkeypatch):
    class Now(Advance):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.now += 10

    record, module, trainer = fit(iterations=8, accumulate=2, callbacks=[Now(monkeypatch), Timer({"seconds": 25})])
    assert trainer.global_step == 1
    assert (replay.weights(module) == record.weights[-1]).all()


def test_every_run_has_the_callback_that_ends_its_ranks_together():
    _, _, trainer = fit(iterations=1)
    assert [type(callback) for callback in trainer.callbacks].count(EndTogether) == 1
