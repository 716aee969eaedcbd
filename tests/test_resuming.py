"""A run that was interrupted anywhere goes on bit for bit."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import replay
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from replay import SaveAt

from grpo_lightning.controllers import Controller
from grpo_lightning.objective import TopEntropyTokens
from grpo_lightning.types import ConfigurationError

SETTINGS = {"num_epochs": 2, "accumulate": 2, "iterations": 12, "live": True}
UPDATES = 2  # of an iteration
POINTS = {"after iteration 7": 4 * 7, "in the middle of an iteration": 4 * 6 + 2}  # in micro-batches


class Crash(Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_phase(self, trainer, pl_module, phase):
        if phase == "update" and pl_module.iteration == self.iteration:
            raise KeyError("as a bug would")


@pytest.fixture(scope="module")
def straight():
    return replay.run(**SETTINGS)[0]


def resumed(path, **changes):
    module, data, trainer, record = replay.make(**{**SETTINGS, **changes})
    trainer.fit(module, data, ckpt_path=path)
    return record, module, trainer


def assert_goes_on(record, straight):
    """The updates of the resumed run are the last ones of the uninterrupted run: weights and metrics, bit for bit."""
    number = len(record.weights)
    assert number >= 2 * 5  # five iterations at least
    for i in range(1, number + 1):
        assert torch.equal(record.weights[-i], straight.weights[-i])
        assert record.metrics[-i] == straight.metrics[-i]


@pytest.mark.parametrize(
    ("micro_batch", "first_update"),
    [
        (4 * 7, 14),  # after iteration 7
        (4 * 6 + 2, 13),  # in the middle of an iteration, after its first update
        (4 * 6 + 3, 13),  # inside the accumulation window of its second update: from the window's start
        (4 * 6 + 1, 12),  # inside the first window of an iteration: from the iteration's start
        (1, 0),  # inside the very first window
    ],
)
def test_interrupted_anywhere(tmp_path, straight, micro_batch, first_update):
    path = tmp_path / "a.ckpt"
    replay.run(**{**SETTINGS, "iterations": 8}, callbacks=[SaveAt(micro_batch, path)])
    record, module, _ = resumed(path)
    assert len(record.weights) == len(straight.weights) - first_update
    assert_goes_on(record, straight)
    assert module.iteration == SETTINGS["iterations"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The whole run under DDP, of which a checkpoint is left at every point, and the folder that has them."""
    folder = tmp_path_factory.mktemp("two_ranks")
    points = [(number, str(folder / f"{number}.ckpt")) for number in POINTS.values()]
    return folder, replay.two_ranks(folder / "straight", **SETTINGS, save_at=points)


@pytest.mark.parametrize("number", POINTS.values(), ids=POINTS.keys())
def test_interrupted_on_two_ranks(two_ranks, number):
    """Weights, optimizer, metrics and tokens: in the middle of an iteration, each rank takes up its own experience."""
    folder, uninterrupted = two_ranks
    resumed = replay.two_ranks(folder / str(number), **SETTINGS, ckpt_path=str(folder / f"{number}.ckpt"))
    for after, before in zip(resumed, uninterrupted, strict=True):
        assert len(after["weights"]) == UPDATES * SETTINGS["iterations"] - number // SETTINGS["accumulate"]
        assert_goes_on(SimpleNamespace(**after), SimpleNamespace(**before))
        assert (after["slots"], after["tokens"]) == (before["slots"], before["tokens"])
        for index, state in before["optimizer"].items():
            assert all(torch.equal(value, after["optimizer"][index][name]) for name, value in state.items())
    assert torch.equal(resumed[0]["weights"][-1], resumed[1]["weights"][-1])
    assert resumed[0]["slots"] != resumed[1]["slots"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the resumed run goes on in the same folder
def test_after_an_exception(tmp_path, straight):
    keep = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, every_n_train_steps=10**6)
    with pytest.raises(KeyError):
        replay.run(**SETTINGS, callbacks=[keep, Crash(6)], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    again = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, every_n_train_steps=10**6)
    assert_goes_on(resumed(path, callbacks=[again], enable_checkpointing=True)[0], straight)


def test_optimizer_state_is_that_of_the_uninterrupted_run(tmp_path):
    path, ends = tmp_path / "a.ckpt", []
    replay.run(**{**SETTINGS, "iterations": 4}, callbacks=[SaveAt(10, path)])
    for start in (None, path):
        module, data, trainer, _ = replay.make(**{**SETTINGS, "iterations": 6})
        trainer.fit(module, data, ckpt_path=start)
        ends.append(trainer.optimizers[0].state_dict())
    for index, state in ends[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, ends[1]["state"][index][name])


@pytest.mark.parametrize("every", [None, 8])
def test_evaluation_does_not_disturb_training(straight, every):
    changes = {"limit_val_batches": 1.0, "val_check_interval": every, "check_val_every_n_epoch": None}
    record, _ = replay.run(**SETTINGS, **(changes if every else {}))
    assert all(map(torch.equal, record.weights, straight.weights))
    assert len(record.weights) == len(straight.weights)


def test_the_command_lines_learning_rate_wins(tmp_path):
    path = tmp_path / "a.ckpt"
    replay.run(**{**SETTINGS, "iterations": 2}, callbacks=[SaveAt(8, path)])
    _, _, trainer = resumed(path, lr=3e-3, iterations=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 3e-3


def test_the_policy_lies_beside_the_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "a.ckpt"
    _, module = replay.run(**{**SETTINGS, "iterations": 1}, callbacks=[SaveAt(4, path)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a.policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a.policy")
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), replay.weights(module))
    ids = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > 4


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"accumulate": 4}, "trainer.accumulate_grad_batches"),
        ({"num_epochs": 3}, "model.num_epochs"),
    ],
)
def test_settings_that_cannot_be_resumed_are_refused_by_key(tmp_path, changes, key):
    path = tmp_path / "a.ckpt"
    replay.run(**{**SETTINGS, "iterations": 1}, callbacks=[SaveAt(2, path)])
    with pytest.raises(ConfigurationError, match=key):
        resumed(path, **changes)


MOVED = {"objective": "deepseekmath", "num_epochs": 2, "iterations": 4}


def saved_run(tmp_path, micro_batch, **settings):
    """A run whose KL coefficient a callback moves from 0.04 to 0.5, saved after a micro-batch."""

    class Move(Controller):
        def on_update_end(self, trainer, module, metrics):
            module.coefficients = module.coefficients._replace(kl=0.5)

    path = tmp_path / "a.ckpt"
    replay.run(**{**MOVED, **settings}, callbacks=[Move(), SaveAt(micro_batch, path)])
    return path


OTHER = {**MOVED, "accumulate": 1, "live": False}


class TestReference:
    """The weights that a run with a KL penalty began with, which its checkpoints do not have."""

    @pytest.fixture
    def path(self, tmp_path):
        return saved_run(tmp_path, 4)

    @pytest.fixture
    def made_anew(self, path, monkeypatch):
        """After that run, one weight of what the policy is loaded from is another one."""
        load = replay.TinyPolicy.load_model

        def loaded(self, *, seed):
            model = load(self, seed=seed)
            with torch.no_grad():
                model.get_output_embeddings().weight[0, 0] += 1e-3
            return model

        monkeypatch.setattr(replay.TinyPolicy, "load_model", loaded)

    @pytest.mark.usefixtures("made_anew")
    def test_another_one_is_refused(self, path):
        with pytest.raises(ConfigurationError, match=r"the run began with other weights than model\.policy has now"):
            resumed(path, **OTHER)

    @pytest.mark.usefixtures("made_anew")
    def test_without_a_penalty_there_is_none(self, path):
        assert resumed(path, **{**OTHER, "objective": "dapo"})[1].iteration == 4

    @pytest.mark.usefixtures("made_anew")
    def test_checkpoints_of_an_earlier_version_say_nothing_of_it(self, path):
        checkpoint = torch.load(path, weights_only=False)
        del checkpoint["grpo_lightning"]["base_checksum"]
        path.with_name("a.ckpt.manifest.json").unlink()
        torch.save(checkpoint, path)
        assert resumed(path, **OTHER)[1].iteration == 4

    @pytest.mark.usefixtures("made_anew")
    def test_one_that_has_moved_is_in_the_checkpoint(self, path):
        checkpoint = torch.load(path, weights_only=False)
        moved = {f"reference.{k.removeprefix('policy.')}": w for k, w in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] |= moved
        path.with_name("a.ckpt.manifest.json").unlink()
        torch.save(checkpoint, path)
        assert resumed(path, **OTHER)[1].iteration == 4


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda o: replace(o, kl=None), "model.objective.kl"),
        (lambda o: replace(o, kl=replace(o.kl, coefficient=0.1)), "model.objective.kl.coefficient"),
        (lambda o: replace(o, masks=(TopEntropyTokens(share=0.2),)), "model.objective.masks"),
    ],
)
def test_in_the_middle_of_an_iteration_the_objective_is_the_one_that_it_was_prepared_for(tmp_path, change, key):
    path = saved_run(tmp_path, 3)
    other = change(replay.overlay("deepseekmath"))
    with pytest.raises(ConfigurationError, match=rf"{re.escape(key)}.*in the middle of an iteration"):
        resumed(path, **{**MOVED, "accumulate": 1, "live": False, "objective": other})


def test_at_its_end_another_objective_takes_over(tmp_path):
    path = saved_run(tmp_path, 4)
    settings = {**MOVED, "accumulate": 1, "live": False}
    _, module, _ = resumed(path, **settings)
    assert module.coefficients.kl == 0.5, "nothing was changed, so what the callback made of it holds"
    objective = replay.overlay("deepseekmath")
    record, module, _ = resumed(
        path, **{**settings, "objective": replace(objective, kl=replace(objective.kl, coefficient=0.1))}
    )
    assert module.coefficients.kl == 0.1
    assert record.metrics[-1]["policy/kl_coefficient"] == pytest.approx(0.1)
    assert resumed(path, **{**settings, "objective": "dapo"})[1].coefficients.kl == 0.0
