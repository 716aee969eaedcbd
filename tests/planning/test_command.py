"""`grpo-lightning plan`, and the page whose numbers it computes."""

import json
import re
from pathlib import Path

import pytest
from planning.scaling import GIB, budget

from grpo_lightning.cli import main
from grpo_lightning.planning.settings import Settings, is_autocast, laid_over, sharding_of
from grpo_lightning.types import ConfigurationError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/scaling.md").read_text()
ROWS = re.findall(r"^\| ([\d.]+B) \|(.+)\|$", PAGE, re.MULTILINE)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The quickstart's, before its cold start was run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return "configs/quickstart.yaml"


def test_a_run_is_planned_before_its_policy_is_there(config, capsys):
    main(["plan", "--config", config, "--prompt_tokens", "16", "--gpu_memory", "1"])
    said = capsys.readouterr().out
    assert "109,120 weights, single, 1 rank; 16 + 48 tokens" in said
    assert re.search(r"^activations +0\.00 +0\.\d\d$", said, re.MULTILINE)
    assert "Of 1 GiB: fits" in said


def test_what_is_missing_is_said(config, capsys):
    main(["plan", "--config", config, "--prompt_tokens", "16", "--gpu_memory", "0.1"])
    assert "does not fit" in capsys.readouterr().out


def test_a_later_config_wins(config, capsys):
    overlay = "configs/strategy/fsdp2.yaml"
    main(["plan", "--config", config, "--config", overlay, "--prompt_tokens", "16", "--ranks", "2"])
    said = capsys.readouterr().out
    assert "fsdp2, 2 ranks" in said
    assert "weights gathered" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config must name a file"),
        (["--config", "none.yaml"], "cannot read 'none.yaml'"),
        (["--config", "configs/quickstart.yaml"], "give --prompt_tokens"),
        (["--config", "configs/quickstart.yaml", "--prompt_tokens", "0"], "--prompt_tokens must be >= 1"),
        (["--config", "configs/quickstart.yaml", "--ranks", "0"], "--ranks must be >= 1"),
    ],
)
def test_a_mistake_is_named(config, capsys, args, message):
    with pytest.raises(SystemExit):
        main(["plan", *args])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainer": {"strategy": [1]}}, "trainer.strategy must have a `class_path`"),
        ({"trainer": {"accumulate_grad_batches": 0}}, "trainer.accumulate_grad_batches must be a whole number >= 1"),
        ({"trainer": {"accumulate_grad_batches": 900}}, "trainer.accumulate_grad_batches must be at most"),
        ({"trainer": {"precision": "bf16-true"}}, "trainer.precision must not be bf16-true"),
        ({"trainer": {"precision": "8"}}, "trainer.precision: plan knows 32-true, "),
        ({"optimizer": {"init_args": {"lrr": 1}}}, "model.optimizer: AdamW.__init__() got an unexpected keyword"),
        ({"optimizer": {"init_args": {"lr": "fast"}}}, "model.optimizer: "),
        ({"optimizer": 3}, "model.optimizer must have a `class_path`"),
        ({"lora": {"rnk": 4}}, "model.lora: LoRA.__init__() got an unexpected keyword argument 'rnk'"),
        ({"lora": 3}, "model.lora must be a group of settings, got 3"),
        ({"layout": "Policy"}, "model.layout: no class is called 'Policy'"),
        ({"group_size": "abc"}, "model.group_size must be a whole number >= 1, got 'abc'"),
        ({"group_size": -4}, "model.group_size must be a whole number >= 1, got -4"),
        ({"group_size": 1}, "model.group_size must be >= 2, got 1"),
        ({"engine": {"class_path": "InProcessEngine", "init_args": {"max_rows": 0}}}, "model.engine.max_rows must be"),
    ],
)
def test_a_mistake_in_the_config_is_named(config, tmp_path, capsys, change, said):
    change = change if "trainer" in change else {"model": {"init_args": change}}
    (tmp_path / "change.yaml").write_text(json.dumps(change))
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--config", config, "--config", "change.yaml", "--prompt_tokens", "16"])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--gpu_memory", "-5"], "--gpu_memory must be > 0"),
        (["--ranks", "5"], "model.prompts_per_iteration must be divisible by"),
        (
            ["--trainer.strategy", "fsdp2"],
            "plan takes --config, --ranks, --gpu_memory and --prompt_tokens, got --trainer",
        ),
        (["--model.group_size=2"], "put this one into a YAML file"),
    ],
)
def test_a_mistake_in_an_option_is_named(config, capsys, args, said):
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--config", config, "--prompt_tokens", "16", *args])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "expected"), [("bf16", True), ("bf16-mixed", True), ("32", False), (32, False)])
def test_a_precision_has_two_names(tmp_path, name, expected):
    assert is_autocast(settings_of(tmp_path, {"precision": name}), "ddp") is expected


def settings_of(tmp_path, trainer):
    (tmp_path / "run.yaml").write_text(json.dumps({"trainer": trainer}))
    return Settings([str(tmp_path / "run.yaml")])


def test_strategies_are_named_as_in_configs(tmp_path):
    sharding = sharding_of(settings_of(tmp_path, {"strategy": "deepspeed_3", "precision": "bf16-mixed"}), 8)
    assert (sharding.name, sharding.compute_itemsize, sharding.offload) == ("deepspeed_3", 2, False)
    assert sharding_of(settings_of(tmp_path, {}), 1).name == "single"
    assert sharding_of(settings_of(tmp_path, {}), 2).name == "ddp"
    with pytest.raises(ConfigurationError, match=r"trainer\.strategy: plan knows .*, got fsdp\."):
        sharding_of(settings_of(tmp_path, {"strategy": "fsdp"}), 2)


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_3", "ddp", "deepspeed_2"])
def test_layers_are_put_together_one_by_one_where_they_are_in_shards(tmp_path, strategy):
    given = {"trainer": {"strategy": strategy}, "model": {"engine": {"init_args": {"gather": "layerwise"}}}}
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    settings = Settings([str(tmp_path / "run.yaml")])
    if strategy in ("fsdp2", "deepspeed_3"):
        assert sharding_of(settings, 2).is_layerwise
    else:
        with pytest.raises(ConfigurationError, match=f"model.engine.gather must be whole under {strategy}"):
            sharding_of(settings, 2)


@pytest.mark.parametrize("engine", ["VLLMServerEngine", "grpo_lightning.rollout.VLLMEngine", "InProcessEngine"])
def test_an_engine_with_a_copy_needs_no_whole_weights(tmp_path, engine):
    given = {"trainer": {"strategy": "fsdp2"}, "model": {"engine": {"class_path": engine}}}
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    assert sharding_of(Settings([str(tmp_path / "run.yaml")]), 2).is_layerwise == ("VLLM" in engine)


def test_zero_converts_where_others_cast(tmp_path):
    mixed = settings_of(tmp_path, {"precision": "bf16-mixed"})
    assert is_autocast(mixed, "ddp")
    assert not is_autocast(mixed, "deepspeed_2")


def test_another_class_drops_the_settings_of_the_one_before():
    below = {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    assert laid_over(below, {"init_args": {"x": 3}}) == {"class_path": "A", "init_args": {"x": 3, "y": 2}}
    assert laid_over(below, {"class_path": "B"}) == {"class_path": "B"}


@pytest.mark.parametrize(
    ("model", "row"), [pytest.param(*row, marks=[pytest.mark.slow] if "LoRA" in row[1] else []) for row in ROWS]
)
def test_the_page_has_the_numbers_of_the_command(tmp_path, model, row):
    gpus, *names, prompts, accumulate, max_rows, rollout, update = (cell.strip() for cell in row.split("|"))
    found = budget(tmp_path, model, int(gpus), *names, int(prompts), int(accumulate), int(max_rows))
    assert f"{found.rollout / GIB:.1f} {found.update / GIB:.1f}" == f"{rollout} {update}"


def test_the_page_has_rows():
    assert len(ROWS) == 11
