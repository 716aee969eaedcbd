"""The summary says what the run did: held against the Trainer's own validation, over interruptions and without data."""

import json

import pytest
import replay
import rich
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning.callbacks.run_summary import RunSummary, commands, show
from grpo_lightning.callbacks.throughput import Throughput
from grpo_lightning.evaluation import Evaluation, EvaluationMetrics

EVALUATION = Evaluation(threshold=0.5)  # the sum of the tokens modulo 7, over 7
KEYS = {
    "heldout_accuracy_before",
    "heldout_accuracy_after",
    "wall_seconds",
    "seconds_by_phase",
    "iterations",
    "optimizer_steps",
    "tokens_generated",
    "tokens_trained",
}


class Evaluations(Callback):
    """Counts the module's own evaluations, outside the Trainer's loops."""

    def __init__(self):
        self.batches = []

    def setup(self, trainer, pl_module, stage):
        evaluate = pl_module.evaluate

        def counted(loader, *, stream):
            batches = list(loader)
            self.batches.append(len(batches))
            return evaluate(batches, stream=stream)

        pl_module.evaluate = counted


def prepared(folder, *callbacks, **settings):
    rich.reconfigure()
    defaults = {"iterations": 4, "live": True, "limit_val_batches": 1.0, "check_val_every_n_epoch": None}
    defaults |= {"logger": CSVLogger(folder, name="run", version="0"), "val_check_interval": 3, "lr": 3e-2}
    module, data, trainer, _ = replay.make(callbacks=[RunSummary(), *callbacks], **{**defaults, **settings})
    module.evaluation, module.held_out = EVALUATION, EvaluationMetrics(EVALUATION)
    return module, data, trainer


def train(folder, *callbacks, ckpt_path=None, **settings):
    module, data, trainer = prepared(folder, *callbacks, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, data, trainer


def summary(folder):
    return json.loads((folder / "run" / "0" / "summary.json").read_text())


def validated(folder, module, data):
    """The accuracy that the Trainer's own validation measures."""
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[replay.TokenSum()],
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    (metrics,) = trainer.validate(module, data, verbose=False)
    return metrics["validation/accuracy"]


def untrained(folder):
    module, data, _ = prepared(folder)
    return validated(folder, module, data)


def test_before_and_after_are_what_validate_measures(tmp_path):
    module, data, _ = train(tmp_path)
    found = summary(tmp_path)
    assert set(found) > KEYS
    assert found["heldout_accuracy_before"] == pytest.approx(untrained(tmp_path), abs=1e-6)
    assert found["heldout_accuracy_after"] == pytest.approx(validated(tmp_path, module, data), abs=1e-6)
    assert found["heldout_accuracy_before"] != found["heldout_accuracy_after"]  # or the test shows nothing
    assert found["heldout_prompts"] == 6


def test_the_numbers_of_the_run_are_the_modules(tmp_path):
    module, _, trainer = train(tmp_path, num_epochs=2)
    found = summary(tmp_path)
    assert (found["iterations"], found["optimizer_steps"]) == (4, 8) == (module.iteration, trainer.global_step)
    assert found["tokens_generated"] == module.tokens_generated > 0
    assert found["tokens_trained"] == module.tokens_trained > 0
    assert {"generate", "score", "prepare", "update", "evaluate"} == set(found["seconds_by_phase"])
    assert sum(found["seconds_by_phase"].values()) <= found["wall_seconds"] + 0.1
    assert (found["seed"], found["interrupted"], found["ranks"]) == (3, False, 1)
    assert found["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("every", "evaluations"), [(4, 1), (3, 2)])
def test_a_validation_of_the_final_weights_is_not_repeated(tmp_path, every, evaluations):
    counter = Evaluations()
    module, data, _ = train(tmp_path, counter, val_check_interval=every)
    assert len(counter.batches) == evaluations
    assert summary(tmp_path)["heldout_accuracy_after"] == pytest.approx(validated(tmp_path, module, data), abs=1e-6)


def test_transformers_alone_loads_the_policy(tmp_path):
    from transformers import AutoModelForCausalLM

    module, _, _ = train(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "0" / "policy")
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), replay.weights(module))


class SaveAt(Callback):
    def __init__(self, iteration, path):
        self.iteration, self.path = iteration, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.iteration == self.iteration:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_tells_of_the_whole_run(tmp_path):
    train(tmp_path / "a", SaveAt(2, tmp_path / "a.ckpt"))
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["RunSummary"]
    state["wall_seconds"] = 1000.0  # as if the first part had been long
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["callbacks"]["RunSummary"] = state
    torch.save(checkpoint, tmp_path / "longer.ckpt")
    counter = Evaluations()
    train(tmp_path / "b", counter, ckpt_path=tmp_path / "longer.ckpt")
    whole, resumed = summary(tmp_path / "a"), summary(tmp_path / "b")
    assert len(counter.batches) == 1  # after, not before
    assert resumed["wall_seconds"] > 1000
    same = ("heldout_before", "heldout_after", "iterations", "optimizer_steps", "tokens_generated", "tokens_trained")
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}


class Crash(Callback):
    def __init__(self, phase, iteration):
        self.phase, self.iteration = phase, iteration

    def on_phase(self, trainer, pl_module, phase):
        if phase == self.phase and pl_module.iteration == self.iteration:
            raise KeyError("as a bug would")


@pytest.mark.parametrize(("phase", "iteration"), [("update", 2), ("evaluate", 3)])
def test_a_run_that_broke_off_says_so_and_claims_nothing(tmp_path, phase, iteration):
    with pytest.raises(KeyError):
        train(tmp_path, Crash(phase, iteration))
    found = summary(tmp_path)
    assert found["interrupted"] is True
    assert found["iterations"] == iteration
    assert found["heldout_accuracy_before"] is not None
    assert found["heldout_accuracy_after"] is None
    assert not (tmp_path / "run" / "0" / "policy").exists()


def test_a_run_that_never_began_leaves_no_summary(tmp_path):
    class Refuse(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise KeyError("as a wrong setting would")

    with pytest.raises(KeyError):
        train(tmp_path, Refuse())
    assert not list(tmp_path.rglob("summary.json"))


class WithoutHeldOut(replay.Sums):
    def rows(self, split):
        return super().rows(split) if split == "train" else []


def test_without_held_out_prompts_the_accuracy_is_null(tmp_path):
    module, _, trainer = prepared(tmp_path, val_check_interval=None, limit_val_batches=0)
    trainer.fit(module, WithoutHeldOut())
    found = summary(tmp_path)
    assert found["heldout_accuracy_before"] is found["heldout_accuracy_after"] is found["heldout_prompts"] is None
    assert found["iterations"] == 4


def test_the_trainers_limit_of_validation_holds(tmp_path):
    counter = Evaluations()
    module, _, trainer = prepared(tmp_path, counter, limit_val_batches=1)
    data = replay.Sums(evaluation_batch_size=2)
    trainer.fit(module, data)
    assert counter.batches == [1, 1]
    assert summary(tmp_path)["heldout_prompts"] == 2


def test_a_trial_of_the_code_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("summary.json"))
    assert not list(tmp_path.rglob("policy"))


def test_a_module_that_cannot_evaluate_has_a_summary_all_the_same(tmp_path):
    rich.reconfigure()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        callbacks=[RunSummary()],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    found = json.loads((tmp_path / "summary.json").read_text())
    assert set(found) > KEYS
    assert (found["optimizer_steps"], found["iterations"], found["heldout_accuracy_after"]) == (3, None, None)


def test_a_second_fit_begins_anew(tmp_path):
    module, data, trainer = train(tmp_path)
    after = summary(tmp_path)["heldout_accuracy_after"]
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, data)
    assert summary(tmp_path)["heldout_accuracy_before"] == after


def test_the_screen_shows_the_change_and_commands_that_can_be_copied(tmp_path, capsys):
    folder = tmp_path / ("a rather long name of a folder " * 3).strip() / "run"
    (folder / "policy").mkdir(parents=True)
    (folder / "config.yaml").touch()
    facts = dict.fromkeys(KEYS, 1234) | {"heldout_accuracy_before": 0.25, "heldout_accuracy_after": 0.915}
    facts |= {"seconds_by_phase": {"generate": 12.34}, "heldout_prompts": 512}
    rich.reconfigure()
    show(folder, facts)
    printed = capsys.readouterr().out
    assert "25.0% → 91.5%" in printed
    assert "512 prompts" in printed
    assert "1,234" in printed
    assert f"talk to it:  grpo-lightning chat '{folder}/policy'" in printed.splitlines()
    assert f"evaluate it: {commands(folder)['evaluate it:']}" in printed.splitlines()


def test_only_commands_that_work_are_named(tmp_path):
    assert set(commands(tmp_path)) == {"artefacts:"}
    (tmp_path / "policy").mkdir()
    assert set(commands(tmp_path)) == {"artefacts:", "talk to it:"}
    (tmp_path / "config.yaml").touch()
    assert set(commands(tmp_path)) == {"artefacts:", "talk to it:", "evaluate it:"}


def test_the_summary_has_what_the_throughput_callback_found(tmp_path, capsys):
    train(tmp_path, Throughput(peak_flops=1e9))
    found = summary(tmp_path)["throughput"]
    assert found["time/iteration"] > 0
    assert found["peak_flops"] == 1e9
    assert found["peak_flops_measured"] is False
    assert found["peak_bandwidth_measured"] is True
    assert "update mfu" in capsys.readouterr().out


def test_a_run_that_measures_no_throughput_has_none(tmp_path):
    train(tmp_path)
    assert summary(tmp_path)["throughput"] == {}
