"""The mechanics of the command line, on a tiny model and data set of the current folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grpo_lightning import cli, cold_start
from grpo_lightning.cli import main
from grpo_lightning.parse_errors import condense
from grpo_lightning.types import ConfigurationError

TOY = """
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from grpo_lightning.policy import CharacterPolicy, PolicySource
from grpo_lightning.types import ConfigurationError, SamplingParams

LAST = {}


class Toy(LightningModule):
    def __init__(
        self,
        sampling: SamplingParams = SamplingParams(),
        policy: PolicySource | None = None,
        group_size: int = 4,
        seed: int = 0,
    ):
        super().__init__()
        if group_size < 2:
            raise ConfigurationError(f"model.group_size must be >= 2, got {group_size}.")
        self.layer = torch.nn.Linear(2, 1)
        self.group_size, self.seed = group_size, seed
        LAST["model"] = self

    def training_step(self, batch, index):
        if self.group_size == 13:
            raise RuntimeError("a defect, not a mistake")
        return self.layer(batch).sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def __init__(self, size: int = 8, seed: int = 0):
        super().__init__()
        self.size, self.seed = size, seed
        LAST["data"] = self

    def train_dataloader(self):
        return DataLoader(torch.ones(self.size, 2), batch_size=2)

    val_dataloader = train_dataloader


class Noted(Callback):
    def __init__(self, word: str = "none"):
        LAST.setdefault("words", []).append(word)
"""

CONFIG = {
    "model": {"class_path": "own_parts.Toy", "init_args": {"group_size": 4}},
    "data": {"class_path": "own_parts.Data", "init_args": {"size": 4}},
    "trainer": {
        "max_steps": 2,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with a user's own module and a config; what was built is in `own_parts.LAST`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    (tmp_path / "own_parts.py").write_text(TOY)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    yield tmp_path
    sys.modules.pop("own_parts", None)


def fit(*args):
    main(["fit", "--config", "run.yaml", *args])
    return sys.modules["own_parts"].LAST


def mistake(capsys, *args):
    """The message of a command that must fail cleanly."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    message = printed[printed.index("error: ") :]
    assert message.count("\n") <= 3
    assert "Traceback" not in printed
    return message


def test_modules_of_the_current_folder_are_found_and_trained(folder):
    last = fit()
    assert last["model"].trainer.global_step == 2
    assert last["data"].size == 4


def test_the_default_seed_is_zero_and_reaches_model_and_data(folder):
    last = fit()
    assert (last["model"].seed, last["data"].seed) == (0, 0)


def test_seed_everything_is_the_seed_of_model_and_data(folder):
    last = fit("--seed_everything", "5")
    assert (last["model"].seed, last["data"].seed) == (5, 5)


def test_a_seed_that_contradicts_seed_everything_is_refused(folder, capsys):
    message = mistake(capsys, "fit", "--config", "run.yaml", "--model.seed", "7")
    assert "model.seed" in message
    assert "seed_everything" in message


def test_a_random_seed_is_refused(folder, capsys):
    assert "seed_everything" in mistake(capsys, "fit", "--config", "run.yaml", "--seed_everything", "true")


def test_a_later_config_overlays_an_earlier_one(folder):
    Path("overlay.yaml").write_text("model: {init_args: {group_size: 6}}\ntrainer: {max_steps: 1}\n")
    last = fit("--config", "overlay.yaml")
    assert last["model"].group_size == 6
    assert last["data"].size == 4
    assert last["model"].trainer.global_step == 1


def test_an_overlay_appends_callbacks(folder):
    Path("run.yaml").write_text(
        yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [{"class_path": "own_parts.Noted"}]}})
    )
    Path("overlay.yaml").write_text(
        "trainer: {callbacks+: {class_path: own_parts.Noted, init_args: {word: appended}}}\n"
    )
    assert fit("--config", "overlay.yaml")["words"] == ["none", "appended"]


def test_short_names_and_full_class_paths_are_the_same_class(folder, capsys):
    for name in ("CharacterPolicy", "grpo_lightning.policy.CharacterPolicy"):
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "--config", "run.yaml", "--model.policy", name, "--print_config"])
        assert exit_info.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["init_args"]["policy"]["class_path"] == "grpo_lightning.policy.CharacterPolicy"


def test_the_printed_config_is_complete_and_runs(folder, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "run.yaml", "--print_config"])
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["model"]["init_args"]["sampling"]["temperature"] == 1.0
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert config["seed_everything"] == 0
    Path("run.yaml").write_text(printed)
    assert fit("--seed_everything", "3")["model"].seed == 3


def test_the_config_of_fit_is_saved_in_the_run_folder_and_evaluation_leaves_it_there(folder):
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "toy", "version": ""}}
    Path("run.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], "logger": logger}}))
    for seed in ("1", "2"):
        fit("--seed_everything", seed)
        saved = yaml.safe_load(Path("runs/toy/config.yaml").read_text())
        assert saved["seed_everything"] == int(seed)
        assert "seed" not in saved["model"]["init_args"]  # so that the saved config can be run with another seed
    main(["validate", "--config", "runs/toy/config.yaml", "--trainer.max_steps", "7"])
    assert yaml.safe_load(Path("runs/toy/config.yaml").read_text()) == saved


def test_settings_of_the_command_line_win_over_those_in_a_checkpoint(folder):
    source = Path("own_parts.py").read_text()
    Path("own_parts.py").write_text(
        source.replace(
            "super().__init__()\n        if",
            'super().__init__()\n        self.save_hyperparameters("group_size")\n        if',
        )
    )
    fit()["model"].trainer.save_checkpoint("toy.ckpt")
    resumed = fit("--ckpt_path", "toy.ckpt", "--model.group_size", "6", "--trainer.max_steps", "4")
    assert resumed["model"].group_size == 6
    assert resumed["model"].trainer.global_step == 4


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("", "must be a command (fit, validate, test, predict, chat, merge, plan), got none"),
        ("fitt", "got 'fitt'"),
        ("fit", "model must be given"),
        ("fit --config absent.yaml", "cannot read 'absent.yaml'"),
        ("RUN --trainer.max_step 3", "did you mean 'trainer.max_steps'?"),
        ("RUN --model.grup_size 3", "model.grup_size: Toy has no setting 'grup_size'; did you mean 'group_size'?"),
        (
            "RUN --model.sampling.temprature 3",
            "SamplingParams has no setting 'temprature'; did you mean 'temperature'?",
        ),
        ("RUN --model.samplin.temperature 3", "Toy has no setting 'samplin'; did you mean 'sampling'?"),
        ("RUN --model.group_size x", "model.group_size must be a whole number, got 'x'"),
        ("RUN --model.group_size 1", "model.group_size must be >= 2, got 1"),
        ("RUN --model Toi", "model: no class is called 'Toi'"),
        ("RUN --model.policy CharacterPolcy", "did you mean 'CharacterPolicy'?"),
        ("RUN --model.policy absent.Policy", "cannot load the class 'absent.Policy'"),
        ("RUN --trainer.strategy ddq", "did you mean 'ddp'"),
        ("RUN --trainer.max_steps x", "trainer.max_steps must be a whole number, got 'x'"),
        ("RUN --ckpt_path absent.ckpt", "ckpt_path: the checkpoint 'absent.ckpt' does not exist"),
        ("chat ./absent", "the model folder './absent' does not exist"),
        ("chat", "folder must be given"),
    ],
)
def test_mistakes_are_named_in_three_lines_and_exit_with_code_2(folder, capsys, args, expected):
    assert expected in mistake(capsys, *args.replace("RUN", "fit --config run.yaml").split())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: [a\nb: c", "broken.yaml, line 2 is not YAML"),
        ("hello", "broken.yaml must hold settings"),
        ("", "broken.yaml must hold settings"),
        ("modle: {a: 1}", "no setting 'modle.a'; did you mean 'model'?"),
        ("model: {class_path: own_parts.Toy, group_size: 3}", "under `init_args`"),
        ("model: {class_path: own_parts.Toy, init_args: {sampling: {tempo: 1}}}", "model.sampling.tempo"),
        ("trainer: {callbacks: [{class_path: own_parts.Data}]}", "not correspond to a subclass of Callback"),
    ],
)
def test_mistakes_in_a_config_file_are_named(folder, capsys, content, expected):
    Path("broken.yaml").write_text(content)
    assert expected in mistake(capsys, "fit", "--config", "run.yaml", "--config", "broken.yaml")


def test_a_defect_keeps_its_traceback(folder):
    with pytest.raises(RuntimeError, match="a defect, not a mistake"):
        fit("--model.group_size", "13")


def test_a_message_that_is_not_understood_is_shortened():
    message = condense("\n".join(f"line {i} {'x' * 1000}" for i in range(20)))
    assert message.startswith("line 0")
    assert max(map(len, message.splitlines())) < 400


def test_a_trial_run_leaves_an_earlier_run_where_it_is(folder):
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "toy", "version": ""}}
    Path("run.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], "logger": logger}}))
    fit()
    before = sorted(Path("runs").rglob("*"))
    fit("--trainer.fast_dev_run", "true")
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize(("is_available", "expected"), [(False, "cpu"), (True, None)])
def test_deepspeed_is_told_where_there_is_no_accelerator(monkeypatch, is_available, expected):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: is_available)
    with pytest.raises(SystemExit):
        main(["fitt"])
    assert os.environ.get("DS_ACCELERATOR") == expected


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is nothing to tell")
@pytest.mark.parametrize("command", ["['fitt']", None], ids=["told", "not told"])
def test_without_an_accelerator_deepspeed_says_nothing_on_stdout(command):
    pytest.importorskip("deepspeed")
    told = f"from grpo_lightning.cli import main\ntry: main({command})\nexcept SystemExit: pass\n" if command else ""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    run = [sys.executable, "-W", "ignore", "-c", told + "import deepspeed"]
    output = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("Setting accelerator to CPU" in output) == (command is None)


def test_other_ranks_stay_silent(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli.rank_zero_only, "rank", 1)
    with pytest.raises(SystemExit) as exit_info:
        main(["fitt"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == ""


class TestMissingPolicy:
    """`made_by`: the policy's folder is made by another config's `fit` where it is missing."""

    @pytest.fixture
    def policy(self, folder):
        Path("cold_start.yaml").write_text("{}")
        return cold_start.Namespace(init_args=cold_start.Namespace(path="policy", made_by="cold_start.yaml"))

    @pytest.fixture
    def commands(self, monkeypatch):
        """The commands that were run; each writes the folder."""
        commands = []

        def run(command, check):
            commands.append(command[1:])
            Path("policy").mkdir(exist_ok=True)
            Path("policy/config.json").write_text("{}")
            Path("policy/model.safetensors").write_text("")
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(cold_start.subprocess, "run", run)
        return commands

    def test_a_missing_folder_is_made_once_with_the_seed_of_the_run(self, policy, commands, capsys):
        cold_start.make_missing_policy(policy, seed=3)
        cold_start.make_missing_policy(policy, seed=3)
        expected = ["fit", "--config", "cold_start.yaml", "--seed_everything", "3"]
        assert commands == [["-m", "grpo_lightning", *expected]]
        assert "cold_start.yaml" in capsys.readouterr().out

    def test_another_seed_or_another_text_of_the_config_makes_it_again(self, policy, commands, capsys):
        cold_start.make_missing_policy(policy, seed=3)
        cold_start.make_missing_policy(policy, seed=4)
        assert "was made by other settings" in capsys.readouterr().out
        Path("cold_start.yaml").write_text("trainer: {}")
        cold_start.make_missing_policy(policy, seed=4)
        cold_start.make_missing_policy(policy, seed=4)
        assert [command[-1] for command in commands] == ["3", "4", "4"]

    def test_what_was_made_when_the_run_broke_off_is_made_again(self, policy, commands, monkeypatch):
        run = cold_start.subprocess.run

        def killed(command, check):
            run(command, check)
            raise KeyboardInterrupt

        monkeypatch.setattr(cold_start.subprocess, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            cold_start.make_missing_policy(policy, seed=3)
        monkeypatch.setattr(cold_start.subprocess, "run", run)
        cold_start.make_missing_policy(policy, seed=4)
        cold_start.make_missing_policy(policy, seed=4)
        assert [command[-1] for command in commands] == ["3", "4"]

    def test_the_one_before_comes_back_when_making_it_anew_is_broken_off(self, policy, commands, monkeypatch):
        cold_start.make_missing_policy(policy, seed=3)

        def interrupted(command, check):
            raise KeyboardInterrupt

        monkeypatch.setattr(cold_start.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cold_start.make_missing_policy(policy, seed=4)
        cold_start.make_missing_policy(policy, seed=3)
        assert len(commands) == 1

    def test_a_folder_with_other_files_is_not_made_anew(self, policy, commands):
        cold_start.make_missing_policy(policy, seed=3)
        Path("policy/notes.txt").write_text("of a user")
        with pytest.raises(ConfigurationError, match=r"model\.policy\.path: .* would be lost: notes\.txt"):
            cold_start.make_missing_policy(policy, seed=4)
        assert Path("policy/notes.txt").is_file()
        assert len(commands) == 1

    def test_a_resumed_run_keeps_the_folder_that_it_began_with(self, policy, commands):
        cold_start.make_missing_policy(policy, seed=3)
        cold_start.make_missing_policy(policy, seed=4, is_resumed=True)
        assert len(commands) == 1

    def test_a_folder_of_its_users_own_stays(self, policy, commands):
        Path("policy").mkdir()
        Path("policy/config.json").write_text("{}")
        cold_start.make_missing_policy(policy, seed=0)
        Path("cold_start.yaml").unlink()
        cold_start.make_missing_policy(policy, seed=0)
        assert commands == []

    def test_without_made_by_nothing_is_run(self, policy, commands):
        policy.init_args.made_by = None
        cold_start.make_missing_policy(policy, seed=0)
        assert commands == []

    def test_a_missing_config_is_named(self, policy, commands):
        Path("cold_start.yaml").unlink()
        with pytest.raises(ConfigurationError, match=r"made_by: the config 'cold_start\.yaml' does not exist"):
            cold_start.make_missing_policy(policy, seed=0)

    def test_a_failure_is_named(self, policy, monkeypatch):
        monkeypatch.setattr(
            cold_start.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1)
        )
        with pytest.raises(ConfigurationError, match="ended with exit code 1"):
            cold_start.make_missing_policy(policy, seed=0)

    def test_a_config_that_makes_something_else_is_named(self, policy, monkeypatch):
        monkeypatch.setattr(
            cold_start.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0)
        )
        with pytest.raises(ConfigurationError, match="did not write the folder 'policy'"):
            cold_start.make_missing_policy(policy, seed=0)

    def test_ranks_of_an_outer_launcher_are_told_to_make_it_first(self, policy, commands, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(ConfigurationError, match="Make it first"):
            cold_start.make_missing_policy(policy, seed=0)
        assert commands == []


def test_the_module_runs_as_a_program(tmp_path):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "grpo_lightning", "--version"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "0.1.0" in result.stdout
