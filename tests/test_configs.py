"""Every shipped config parses, instantiates, and keeps its artefacts together."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from grpo_lightning.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.yaml") if path.parent.name != "launch")
OVERLAYS = [path for path in CONFIGS if path.parent != ROOT / "configs"]
ALGORITHMS = [path for path in OVERLAYS if path.parent.name == "algorithm"]
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
    """What an overlay sets comes out as it stands there, whatever run it is laid on, and the run keeps its rewards."""
    check_layers(run, overlay, wanted=overlay, capsys=capsys)


@pytest.mark.parametrize("overlay", ALGORITHMS, ids=name)
def test_nothing_of_another_algorithm_is_left(overlay, capsys):
    """Where a class is switched, its settings of the same name would stay."""
    other = ALGORITHMS[ALGORITHMS.index(overlay) - 1]
    check_layers(GRPO_RUNS[0], other, overlay, wanted=overlay, capsys=capsys)


@pytest.mark.parametrize("overlay", ALGORITHMS, ids=name)
def test_an_algorithm_builds_its_objective_and_names_its_source(overlay, built):
    objective = built(ROOT / "configs/quickstart.yaml", overlay)["model"].objective
    stated = yaml.safe_load(overlay.read_text())["model"]["init_args"]["objective"]
    assert {field.name for field in fields(objective)} == set(stated), "every part is stated"
    assert "https://" in overlay.read_text().split("model:")[0]


def check_layers(*paths, wanted, capsys):
    stated = yaml.safe_load(wanted.read_text())
    assert "callbacks" not in stated.get("trainer", {}), "an overlay appends with `callbacks+`"
    stated.get("trainer", {}).pop("callbacks+", None)
    made = short(printed(capsys, *paths))
    assert covers(made, short(stated))
    objective = stated.get("model", {}).get("init_args", {}).get("objective")
    assert objective is None or made["model"]["init_args"]["objective"] == short(objective)
    of_run = [name for name, _ in short(yaml.safe_load(paths[0].read_text()))["trainer"]["callbacks"]]
    assert [name for name, _ in made["trainer"]["callbacks"]][: len(of_run)] == of_run


def short(tree):
    """A tree in which a class and its settings are a pair of its name and them; but a module is its settings."""
    if isinstance(tree, dict) and "class_path" in tree and tree["class_path"].split(".")[-1] != "GRPOModule":
        return tree["class_path"].split(".")[-1], short(tree.get("init_args") or {})
    if isinstance(tree, dict):
        return {key: short(value) for key, value in tree.items()}
    return [short(value) for value in tree] if isinstance(tree, list) else tree


def covers(made, wanted):
    """Whether every setting of `wanted` is in `made`; a class's settings must be stated in full."""
    if not isinstance(wanted, dict):
        return made == wanted
    return all(covers(made[key], value) for key, value in wanted.items() if key != "class_path")
