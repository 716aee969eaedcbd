"""A command that is refused leaves the earlier run in its folder as it was, and that run can be gone on with."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_bad_input import CONFIG, mistake_of, put

from grpo_lightning.cli import main

LOGGER = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "run", "version": ""}}
CHECKPOINTS = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}}
REWARD = {"class_path": "ExactAnswer"}

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def callbacks(*more):
    return {"trainer.callbacks": [REWARD, CHECKPOINTS, *more]}


REFUSED = {
    "prompts that cannot be shared out": ({"model.init_args.num_minibatches": 3}, "model.num_minibatches"),
    "weights of half precision": ({"trainer.precision": "bf16-true"}, "trainer.precision"),
    "a policy in half precision": (
        {
            "model.init_args.policy": {
                "class_path": "PretrainedPolicy",
                "init_args": {"path": "policy", "dtype": "bfloat16"},
            }
        },
        "model.policy.dtype",
    ),
    "layers gathered that are whole": (
        {"model.init_args.engine": {"class_path": "InProcessEngine", "init_args": {"gather": "layerwise"}}},
        "model.engine.gather",
    ),
    "targets that the policy does not have": ({"model.init_args.lora": {"targets": ["c_attn"]}}, "model.lora.targets"),
    "compiled blocks that are in shards": (
        {"trainer.strategy": "deepspeed_3", "model.init_args.compile": {"backend": "aot_eager"}},
        "model.compile",
    ),
    "a precision that ZeRO has not": (
        {"trainer.strategy": "deepspeed_2", "trainer.precision": "16-mixed"},
        "trainer.precision under deepspeed_2",
    ),
    "no such policy": (
        {"model.init_args.policy": {"class_path": "PretrainedPolicy", "init_args": {"path": "./absent"}}},
        "model.policy.path",
    ),
    "a missing held-out reward": ({"model.init_args.evaluation": {"correct": "absent"}}, "model.evaluation.correct"),
    "prompts that are too long": ({"data.init_args.max_prompt_tokens": 1}, "data.max_prompt_tokens"),
    "an epoch that ends within an iteration": (
        {"trainer.limit_train_batches": 3, "model.init_args.num_epochs": 2},
        "trainer.limit_train_batches",
    ),
    "more ranks than prompts": ({"trainer.strategy": "ddp", "trainer.devices": 8}, "number of ranks = 1 x 8"),
    "a callback that cannot work": (
        callbacks({"class_path": "LearningRateFinder"}),
        "LearningRateFinder is not supported",
    ),
}
"""What is changed, and what the message names."""

REFUSED_LATE = {
    "a callback that looks at the model": (
        callbacks({"class_path": "AdaptiveKL", "init_args": {"target": 0.1}}),
        "AdaptiveKL",
    ),
    "a completion that is too long": (
        {"model.init_args.sampling.max_new_tokens": 64},
        "model.sampling.max_new_tokens",
    ),
}
"""Of which the command line hears when Lightning has set up the run."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of two steps and a policy."""
    folder = tmp_path_factory.mktemp("made")
    config = copy.deepcopy(CONFIG)
    for key, value in {"trainer.logger": LOGGER, "trainer.enable_checkpointing": True, **callbacks()}.items():
        put(config, key, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("run.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "--config", "run.yaml"])
        shutil.copytree("runs/run/checkpoints/last.policy", "policy")
    return folder


@pytest.fixture
def config(made, tmp_path, monkeypatch):
    """The config of the run, in a folder with a copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return yaml.safe_load(Path("run.yaml").read_text())


def contents(folder="runs"):
    """Of every file below a folder: its bytes, and when they were written."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def refuse(capsys, config, changes, *arguments):
    for key, value in changes.items():
        put(config, key, value)
    Path("refused.yaml").write_text(yaml.safe_dump(config))
    return mistake_of(capsys, "fit", "--config", "refused.yaml", *arguments)


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_on_disk_is_touched(config, capsys, monkeypatch, changes, said):
    before, moved = contents(), []
    monkeypatch.setattr("pathlib.Path.rename", lambda path, to: moved.append(path))
    assert said in refuse(capsys, config, changes)
    assert contents() == before
    assert moved == []


@pytest.mark.parametrize(("changes", "said"), REFUSED_LATE.values(), ids=REFUSED_LATE.keys())
def test_what_is_refused_late_is_put_back(config, capsys, changes, said):
    before = contents()
    assert said in refuse(capsys, config, changes)
    assert contents() == before


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
@pytest.mark.parametrize("which", ["targets that the policy does not have", "a completion that is too long"])
def test_the_earlier_run_goes_on(config, capsys, monkeypatch, which):
    refuse(capsys, config, (REFUSED | REFUSED_LATE)[which][0])
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: (steps.append(1), step(*args, **kwargs))[1])
    main(["fit", "--config", "run.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3"])
    assert len(steps) == 1


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The checkpoint last.ckpt is skipped")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.init_args.group_size": 4}, "model.group_size: the checkpoint was written with 2"),
        ({"seed_everything": 7}, "model.seed: the checkpoint was written with 0"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(config, capsys, changes, said):
    logger = {**LOGGER, "class_path": "grpo_lightning.appending_csv.AppendingCSVLogger"}
    torn = Path("runs/run/checkpoints/last.ckpt").resolve()
    torn.write_bytes(torn.read_bytes()[:-1])
    before = contents()
    assert said in refuse(capsys, config, {"trainer.logger": logger, **changes}, "--ckpt_path", "last")
    assert contents() == before
    main(["fit", "--config", "run.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3"])
    assert yaml.safe_load(Path("runs/run/config.yaml").read_text())["trainer"]["max_steps"] == 3
    assert Path(f"{torn}.torn").is_file()


def breaking(error, when):
    """An optimizer's step that breaks."""
    steps, step = [], torch.optim.AdamW.step

    def broken(self, *args, **kwargs):
        if len(steps) == when:
            raise error
        steps.append(1)
        return step(self, *args, **kwargs)

    return broken


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError("no space left"), SystemExit(143)])
def test_what_breaks_before_the_first_step_is_put_back(config, monkeypatch, error):
    before = contents()
    monkeypatch.setattr(torch.optim.AdamW, "step", breaking(error, when=0))
    with pytest.raises(type(error)):
        main(["fit", "--config", "run.yaml"])
    assert contents() == before


def test_what_breaks_later_stays_beside_the_earlier_run(config, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", breaking(RuntimeError("a defect"), when=1))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["fit", "--config", "run.yaml"])
    assert Path("runs/run.1/config.yaml").is_file()
    assert Path("runs/run/config.yaml").is_file()


def test_what_has_saved_before_it_breaks_stays_beside_the_earlier_run(config, monkeypatch):
    def step(self, closure=None):
        Path("runs/run/checkpoints").mkdir()
        Path("runs/run/checkpoints/of_a_stop.ckpt").write_text("")
        raise RuntimeError("a defect")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["fit", "--config", "run.yaml"])
    assert Path("runs/run.1/config.yaml").is_file()
    assert Path("runs/run/checkpoints/of_a_stop.ckpt").is_file()


def test_a_server_that_is_absent_is_said_in_a_line(config, capsys):
    before = contents()
    engine = {"class_path": "VLLMServerEngine", "init_args": {"urls": ["http://127.0.0.1:9"], "patience_seconds": 0.5}}
    message = refuse(capsys, config, {"model.init_args.engine": engine})
    assert "error: model.engine.urls: no answer for 0.5 s: http://127.0.0.1:9" in message
    assert contents() == before


@pytest.fixture
def made_by(config, monkeypatch):
    """The run's policy is a cold start that other settings have made, and its `fit` does nothing but write files."""
    cold = "{export_to: cold/policy}"
    Path("cold_start.yaml").write_text(f"model: {{class_path: SupervisedModule, init_args: {cold}}}")
    shutil.copytree("policy", "cold/policy")
    Path("cold/policy/made_by.json").write_text('{"config": "another", "seed": 1}')

    def make(command, check):
        shutil.copytree("policy", "cold/policy")
        return SimpleNamespace(returncode=made.exit_code)

    made = SimpleNamespace(exit_code=0)
    monkeypatch.setattr("grpo_lightning.cold_start.subprocess.run", make)
    settings = {"path": "cold/policy", "made_by": "cold_start.yaml"}
    put(config, "model.init_args.policy", {"class_path": "PretrainedPolicy", "init_args": settings})
    return made


@pytest.mark.parametrize("which", ["targets that the policy does not have", "a completion that is too long"])
@pytest.mark.usefixtures("made_by")
def test_a_refused_run_leaves_the_cold_start_as_it_was(config, capsys, which):
    before = contents("cold")
    assert (REFUSED | REFUSED_LATE)[which][1] in refuse(capsys, config, (REFUSED | REFUSED_LATE)[which][0])
    assert contents("cold") == before


def test_a_cold_start_that_fails_leaves_the_one_before(config, capsys, made_by):
    before, made_by.exit_code = contents("cold"), 2
    assert "ended with exit code 2" in refuse(capsys, config, {})
    assert contents("cold") == before


@pytest.mark.usefixtures("made_by")
def test_a_run_that_begins_has_the_cold_start_of_its_settings(config):
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    assert '"seed": 0' in Path("cold/policy/made_by.json").read_text()
    assert [path.name for path in Path("cold").iterdir()] == ["policy"]


def test_a_mistyped_folder_is_named_before_the_policy_is_made(config, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("the cold start was run"))
    Path("cold_start.yaml").write_text(
        "model: {class_path: SupervisedModule, init_args: {export_to: runs/cold/policy}}"
    )
    settings = {"path": "runs/clod/policy", "made_by": "cold_start.yaml"}
    before = contents()
    message = refuse(
        capsys, config, {"model.init_args.policy": {"class_path": "PretrainedPolicy", "init_args": settings}}
    )
    assert "model.policy.path: 'cold_start.yaml' (model.policy.made_by) does not make 'runs/clod/policy'" in message
    assert "'runs/cold/policy'" in message
    assert contents() == before
