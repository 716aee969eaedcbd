"""Every shipped config parses, instantiates, and keeps its artefacts together."""

import copy
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from grpo_lightning.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
OVERLAYS = [path for path in CONFIGS if path.parent != ROOT / "configs"]
RUNS = [path for path in CONFIGS if path not in OVERLAYS]
GRPO_RUNS = [path for path in RUNS if "GRPOModule" in path.read_text()]


def name(path):
    return str(path.relative_to(ROOT / "configs"))


def printed(capsys, *configs):
    """The complete config that the files make together."""
    arguments = [argument for path in configs for argument in ("--config", str(path))]
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *arguments, "--print_config"])
    captured = capsys.readouterr()
    assert exit_info.value.code == 0, captured.err
    return yaml.safe_load(captured.out)


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Build everything that a config names, and stop before it is run; from another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grpo_lightning.cli.make_missing_policy", lambda policy, *, seed, is_resumed: None)
    parts = {}

    def note(cli, subcommand):
        parts.update(model=cli.model, data=cli.datamodule, trainer=cli.trainer)

    monkeypatch.setattr(LightningCLI, "_run_subcommand", note)

    def build(*paths):
        main(["fit", *(argument for path in paths for argument in ("--config", str(path)))])
        return parts

    return build


def test_there_is_a_quickstart():
    assert "quickstart.yaml" in map(name, RUNS)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_parses_and_prints_a_config_that_parses_to_the_same(path, capsys, tmp_path):
    config = printed(capsys, path)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(config))
    assert printed(capsys, tmp_path / "printed.yaml") == config


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_builds_its_model_data_and_trainer(path, built):
    parts = built(path)
    assert isinstance(parts["trainer"], Trainer)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_keeps_its_artefacts_in_one_folder(path, built):
    loggers = built(path)["trainer"].loggers
    wanted = {"TensorBoardLogger", "AppendingCSVLogger"} if path in GRPO_RUNS else {"AppendingCSVLogger"}
    assert {type(logger).__name__ for logger in loggers} >= wanted
    folders = {str(Path(logger.log_dir)) for logger in loggers}
    assert len(folders) == 1
    assert folders.pop().startswith("runs")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
@pytest.mark.parametrize("run", GRPO_RUNS, ids=name)
def test_an_overlay_says_all_that_it_is_about(run, overlay, capsys):
    """What an overlay sets comes out as it stands there, whatever run it is laid on."""
    wanted = yaml.safe_load(overlay.read_text())
    assert "callbacks" not in wanted.get("trainer", {}), "an overlay appends with `callbacks+`"
    made = printed(capsys, run, overlay)
    assert covers(made, without_appended(wanted))


def without_appended(settings):
    settings = copy.deepcopy(settings)
    settings.get("trainer", {}).pop("callbacks+", None)
    return settings


def covers(made, wanted):
    """Whether every setting of `wanted` is in `made`; a class's settings must be stated in full."""
    if not isinstance(wanted, dict):
        return made == wanted
    if "class_path" in wanted and wanted["class_path"].split(".")[-1] != "GRPOModule":
        same_class = made["class_path"].split(".")[-1] == wanted["class_path"].split(".")[-1]
        return same_class and made.get("init_args", {}) == wanted.get("init_args", {})
    return all(covers(made[key], value) for key, value in wanted.items() if key != "class_path")
