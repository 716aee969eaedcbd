"""The bar and the lines say where the run stands."""

import io
import re

import pytest
import replay
import rich
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

from grpo_lightning.callbacks.training_progress import TrainingProgress
from grpo_lightning.types import ConfigurationError


@pytest.fixture(autouse=True)
def own_console():
    """Lightning's bar reconfigures the console of the whole process."""
    yield
    rich.reconfigure()


@pytest.fixture
def terminal():
    return io.StringIO()


def bar(file, **arguments):
    return TrainingProgress(console_kwargs={"file": file, "force_terminal": True, "width": 150}, **arguments)


def train(*callbacks, ckpt_path=None, **settings):
    module, data, trainer, _ = replay.make(callbacks=callbacks, enable_progress_bar=True, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_where_there_is_no_terminal_every_nth_iteration_is_a_line(capsys):
    train(TrainingProgress(print_every_n_iterations=3), iterations=7, num_epochs=2, accumulate=2)
    printed = lines(capsys)
    assert [line.split()[1] for line in printed] == ["1/7", "3/7", "6/7", "7/7"]
    assert all(
        re.match(r"iteration \d/7  reward 0\.\d{3}  solved \d+%  loss -?\d\.\d{3}  tokens/s [\d,]+", line)
        for line in printed
    )
    assert not any("\x1b" in line for line in printed)


def test_where_there_is_no_terminal_a_validation_is_a_line(capsys):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    train(TrainingProgress(print_every_n_iterations=100), iterations=4, **settings)
    found = [line for line in lines(capsys) if "validation" in line]
    assert [line.split()[1] for line in found] == ["2", "4"]
    assert all("accuracy 0" in line and "num_prompts 6" in line for line in found)


def test_the_rate_is_of_the_iterations_since_the_last_line():
    class Module:
        seconds_by_phase = {"generate": 1.0, "update": 1.0, "evaluate": 10.0}  # noqa: RUF012
        tokens_generated = 100

    progress = TrainingProgress()
    assert progress._take_stock(Module) == Module.seconds_by_phase
    assert progress._tokens_per_second == 50.0
    Module.seconds_by_phase = {"generate": 1.5, "update": 1.5, "evaluate": 20.0}
    Module.tokens_generated = 190
    assert progress._take_stock(Module) == {"generate": 0.5, "update": 0.5, "evaluate": 10.0}
    assert progress._tokens_per_second == 90.0


def test_a_terminal_gets_a_bar_of_the_whole_run_and_no_lines(capsys, terminal):
    train(bar(terminal), iterations=5, num_epochs=2, accumulate=2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    last = shown.strip().splitlines()[-1]
    assert re.match(r"Iteration update +━+ 5/5 ", last)
    assert re.search(r"reward: 0\.\d{3} solved: \d+% loss: -?\d\.\d{3} tokens/s: [\d,]+", last)
    assert lines(capsys) == []


class Watch(Callback):
    """Reads the bar's description in every phase, after the bar has heard of it."""

    def __init__(self, progress):
        self.progress, self.seen = progress, []

    def on_phase(self, trainer, pl_module, phase):
        if self.progress.train_progress_bar_id is not None:
            self.seen.append((phase, self.progress.train_progress_bar.description.split()[-1]))


def test_the_phase_is_shown_while_it_lasts(terminal):
    progress = bar(terminal)
    watch = Watch(progress)
    train(progress, watch, iterations=2)
    running = [(phase, shown) for phase, shown in watch.seen if phase is not None]
    assert [phase for phase, _ in running] == ["generate", "score", "prepare", "update"] * 2
    assert all(phase == shown for phase, shown in running)


def test_a_resumed_run_goes_on_in_the_middle_of_the_bar(tmp_path, terminal):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            self.completed, self.total = progress.train_progress_bar.completed, progress.train_progress_bar.total

    replay.run(callbacks=[Save()], iterations=3)
    progress, start = bar(terminal), Start()
    train(progress, start, iterations=5, ckpt_path=tmp_path / "a.ckpt")
    assert (start.completed, start.total) == (3, 5)
    assert progress.train_progress_bar.completed == 5


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_module_without_iterations_is_counted_in_steps(capsys, tmp_path, terminal, is_terminal):
    class Logged(BoringModel):
        def training_step(self, batch, batch_idx):
            self.log("extra", 0.25, prog_bar=True)
            return super().training_step(batch, batch_idx)

    progress = bar(terminal) if is_terminal else TrainingProgress(print_every_n_iterations=2)
    Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[progress],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    ).fit(Logged())
    if is_terminal:
        assert "4/4" in terminal.getvalue()
        assert "extra: 0.250" in terminal.getvalue()
    else:
        assert lines(capsys) == [f"step {i}/4  extra 0.250" for i in (1, 2, 4)]


def test_a_refresh_rate_of_zero_shows_nothing(capsys, terminal):
    train(bar(terminal, refresh_rate=0), iterations=2)
    assert terminal.getvalue() == ""
    train(TrainingProgress(refresh_rate=0), iterations=2)
    assert lines(capsys) == []


@pytest.mark.parametrize("argument", ["refresh_rate", "print_every_n_iterations"])
def test_an_argument_out_of_range_is_named(argument):
    with pytest.raises(ConfigurationError, match=rf"TrainingProgress\.{argument} must be >= \d, got -1"):
        TrainingProgress(**{argument: -1})
