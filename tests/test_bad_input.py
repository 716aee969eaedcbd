"""Every mistake that a user is likely to make: a message of at most three lines, exit code 2, no optimizer step."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from grpo_lightning.checkpointing.writing import write_file
from grpo_lightning.cli import main
from grpo_lightning.policy import CharacterPolicy, Policy, PretrainedPolicy

POLICY = {
    "class_path": "CharacterPolicy",
    "init_args": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 64},
}
ARITHMETIC = {
    "class_path": "Arithmetic",
    "init_args": {"num_terms": 3, "num_train": 16, "num_validation": 4, "num_test": 4, "num_demonstrations": 8},
}
CONFIG = {
    "model": {
        "class_path": "GRPOModule",
        "init_args": {
            "policy": POLICY,
            "objective": {
                "advantage": {"class_path": "GroupMean"},
                "scale": {"class_path": "GroupStd", "init_args": {"ddof": 1, "epsilon": 1e-6}},
                "ratio": {"class_path": "TokenRatio"},
                "surrogate": {"class_path": "Clipped", "init_args": {"clip_low": 0.2, "clip_high": 0.2}},
                "aggregation": {"class_path": "SequenceMeanTokenMean"},
            },
            "sampling": {"max_new_tokens": 4},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "prompts_per_iteration": 4,
            "group_size": 2,
        },
    },
    "data": ARITHMETIC,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "own_rewards.Uneven"}],
    },
}

OWN_REWARDS = '''
from grpo_lightning.rewards import RewardCallback


class Uneven(RewardCallback):
    """Rewards that differ within every group, so that there is something to learn."""

    def __init__(self, name: str = "uneven", weight: float = 1.0):
        super().__init__(name, weight)

    def score(self, prompts, completions):
        return [float(i % 2) for i, _ in enumerate(completions)]


class TooFew(Uneven):
    def score(self, prompts, completions):
        return [1.0]


class Text(Uneven):
    def score(self, prompts, completions):
        return ["good"] * len(completions)


def broken(completions, **columns):
    return [1 / 0 for _ in completions]


def in_words(prompts, completions, **columns):
    return "good"
'''


ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]


class LoadedError(Exception):
    """A model was loaded though the mistake could be known before."""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The current folder with a user's rewards, and a config that is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    yield copy.deepcopy(CONFIG)
    sys.modules.pop("own_rewards", None)


@pytest.fixture
def no_step(monkeypatch):
    """No optimizer step may be made."""

    def step(self, closure=None):
        raise AssertionError("an optimizer step was made")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.fixture
def no_model(monkeypatch):
    """No model may be loaded."""

    def load(self, *, seed):
        raise LoadedError

    for source in (CharacterPolicy, PretrainedPolicy):
        monkeypatch.setattr(source, "load_model", load)


def put(config, key, value):
    """Set a value by its path, with a number for a list's item."""
    *path, last = key.split(".")
    for name in path:
        config = config[int(name)] if isinstance(config, list) else config.setdefault(name, {})
    config[last] = value


def fit(config, *args):
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml", *args])


def mistake(capsys, config, *args):
    """The message of a run that must fail cleanly."""
    Path("run.yaml").write_text(yaml.safe_dump(config))
    return mistake_of(capsys, "fit", "--config", "run.yaml", *args)


def mistake_of(capsys, *args):
    """The message of a command that must fail cleanly."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    message = printed[printed.index("error: ") :]
    assert len(message.strip().splitlines()) <= 3
    return message


def test_the_config_that_the_mistakes_are_made_in_is_right(config):
    fit(config)


KNOWN_BEFORE_THE_MODEL = {
    "a misspelt key": ({"model.init_args.grup_size": 4}, "model.grup_size", "group_size"),
    "a misspelt nested key": ({"model.init_args.sampling.temprature": 1.0}, "model.sampling.temprature", "temperature"),
    "a misspelt trainer key": ({"trainer.max_step": 4}, "trainer.max_step", "trainer.max_steps"),
    "an unknown class": ({"model.init_args.policy.class_path": "CharaterPolicy"}, "model.policy", "CharacterPolicy"),
    "an unknown class path": ({"data.class_path": "absent.Data"}, "data", "absent.Data"),
    "a value of the wrong type": ({"model.init_args.group_size": "four"}, "model.group_size", "four"),
    "a value for a group of settings": ({"model.init_args.sampling": 3}, "model.sampling", "got 3"),
    "a word for a group of settings": ({"model.init_args.objective": "grpo"}, "model.objective", "got 'grpo'"),
    "nothing for a group of settings": ({"model.init_args.sampling": None}, "model.sampling", "temperature"),
    "a value for an optional group": ({"model.init_args.schedule": 3}, "model.schedule", "warmup_steps"),
    "a value for the trainer": ({"trainer": 3}, "trainer", "got 3"),
    "a value for a class": ({"model.init_args.optimizer": 3}, "model.optimizer", "class_path"),
    "settings without their class": ({"data": {"init_args": {"num_terms": 3}}}, "data", "class_path"),
    "a misspelt key of the optimizer": ({"model.init_args.optimizer.init_args.lrr": 1}, "model.optimizer.lrr", "'lr'"),
    "an optimizer's value of the wrong type": (
        {"model.init_args.optimizer.init_args.lr": "fast"},
        "model.optimizer.lr",
        "a number, got 'fast'",
    ),
    "a negative learning rate": ({"model.init_args.optimizer.init_args.lr": -1.0}, "model.optimizer: AdamW", "-1.0"),
    "no width": ({"model.init_args.policy.init_args.hidden_size": 0}, "model.policy.hidden_size", ">= 1, got 0"),
    "no heads": ({"model.init_args.policy.init_args.num_heads": 0}, "model.policy.num_heads", ">= 1, got 0"),
    "fewer tokens than none": ({"model.init_args.sampling.min_new_tokens": -1}, "model.sampling.min_new_tokens", "-1"),
    "a minimum above the maximum": (
        {"model.init_args.sampling.min_new_tokens": 5},
        "model.sampling.min_new_tokens",
        "model.sampling.max_new_tokens = 4",
    ),
    "an alphabet without the prompts' characters": (
        {"model.init_args.policy.init_args.characters": "xyz"},
        "model.policy.characters",
        "row 0",
    ),
    "a hub id for a policy": ({"model.init_args.policy": "owner/model"}, "model.policy", "no class is called"),
    "an unknown class of the optimizer": (
        {"model.init_args.optimizer.class_path": "Adamm"},
        "model.optimizer",
        "Adamm",
    ),
    "a negative seed": ({"seed_everything": -1}, "seed_everything", "got -1"),
    "a missing model folder": (
        {"model.init_args.policy": {"class_path": "PretrainedPolicy", "init_args": {"path": "./absent"}}},
        "model.policy.path",
        "./absent",
    ),
    "no reward": ({"trainer.callbacks": []}, "trainer.callbacks", "reward"),
    "two rewards of one name": (
        {"trainer.callbacks": [{"class_path": "own_rewards.Uneven"}, {"class_path": "own_rewards.Uneven"}]},
        "trainer.callbacks",
        "uneven",
    ),
    "layers gathered that are whole": (
        {"model.init_args.engine": {"class_path": "InProcessEngine", "init_args": {"gather": "layerwise"}}},
        "model.engine.gather",
        "got layerwise",
    ),
    "a third way to gather": (
        {"model.init_args.engine": {"class_path": "InProcessEngine", "init_args": {"gather": "some"}}},
        "model.engine.gather",
        "got 'some'",
    ),
    "layers gathered for another engine": (
        {"model.init_args.engine": {"class_path": "VLLMServerEngine", "init_args": {"gather": "layerwise"}}},
        "model.engine",
        "gather",
    ),
    "a group of one": ({"model.init_args.group_size": 1}, "model.group_size", "got 1"),
    "prompts that cannot be shared out": (
        {"model.init_args.num_minibatches": 3},
        "model.prompts_per_iteration",
        "got 4",
    ),
    "more micro-batches than completions": (
        {"trainer.accumulate_grad_batches": 9},
        "trainer.accumulate_grad_batches",
        "8 completions",
    ),
    "a schedule of the accumulation": (
        {
            "trainer.callbacks": [
                {"class_path": "own_rewards.Uneven"},
                {"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}},
            ]
        },
        "GradientAccumulationScheduler",
        "trainer.accumulate_grad_batches",
    ),
    "top-p in training": ({"model.init_args.sampling.top_p": 0.9}, "model.sampling", "top_p"),
    "top-k in training": ({"model.init_args.sampling.top_k": 5}, "model.sampling", "top_k"),
    "no rank": ({"model.init_args.lora": {"rank": 0}}, "model.lora.rank", ">= 1, got 0"),
    "a misspelt key of the adapter": ({"model.init_args.lora": {"rnk": 4}}, "model.lora.rnk", "rank"),
    "an adapter that is not there": (
        {"model.init_args.lora": {"from_adapter": "./absent"}},
        "model.lora.from_adapter",
        "absent",
    ),
    "a reference that cannot be moved": (
        {
            "model.init_args.lora": {"rank": 4},
            "model.init_args.objective.kl": {
                "class_path": "KLInLoss",
                "init_args": {"coefficient": 0.1, "estimator": {"class_path": "K3"}},
            },
            "trainer.callbacks": [
                {"class_path": "own_rewards.Uneven"},
                {"class_path": "ReferenceRefresh", "init_args": {"every_n_steps": 1}},
            ],
        },
        "ReferenceRefresh",
        "model.lora",
    ),
    "a time without its unit": ({"trainer.max_time": "2s"}, "trainer.max_time", "DD:HH:MM:SS"),
    "a negative norm to clip to": ({"trainer.gradient_clip_val": -1}, "trainer.gradient_clip_val", "got -1"),
    "validations at every moment": ({"trainer.val_check_interval": 0}, "trainer.val_check_interval", "got 0"),
    "a strategy that refuses its settings": (
        {"trainer.strategy": {"class_path": "FSDP2Strategy", "init_args": {"process_group_backend": "glooo"}}},
        "trainer.strategy.process_group_backend",
        "got glooo",
    ),
    "a strategy that does not exist": ({"trainer.strategy": {"class_path": "Nope"}}, "trainer.strategy", "'Nope'"),
    "settings of no strategy": ({"trainer.strategy": {"init_args": {}}}, "trainer.strategy", "class_path"),
    "a strategy's class without settings": ({"trainer.strategy": "FSDP2Strategy"}, "trainer.strategy", "class_path"),
    "a mistyped strategy": ({"trainer.strategy": "fspd1"}, "trainer.strategy", "did you mean 'fsdp1'"),
    "ranks started within the process": ({"trainer.strategy": "ddp_spawn"}, "trainer.strategy: ddp_spawn", "set ddp"),
    "fewer steps than none": ({"trainer.max_steps": -3}, "trainer.max_steps", "-3"),
    "no step": ({"trainer.max_steps": 0}, "trainer.max_steps", "got 0"),
    "ranks that do not communicate": (
        {"trainer.strategy": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "fake"}}},
        "trainer.strategy.process_group_backend",
        "got fake",
    ),
    "a timeout that is none": (
        {"trainer.strategy": {"class_path": "FSDP2Strategy", "init_args": {"timeout_seconds": None}}},
        "trainer.strategy.timeout_seconds",
        "got None",
    ),
    "patience without an end": (
        {
            "model.init_args.engine": {
                "class_path": "VLLMServerEngine",
                "init_args": {"urls": ["http://127.0.0.1:9"], "patience_seconds": float("inf")},
            }
        },
        "model.engine.patience_seconds",
        "got inf",
    ),
    "greedy training": ({"model.init_args.sampling.temperature": 0.0}, "model.sampling.temperature", "> 0"),
}


@pytest.mark.parametrize(
    ("changes", "key", "detail"), KNOWN_BEFORE_THE_MODEL.values(), ids=KNOWN_BEFORE_THE_MODEL.keys()
)
def test_a_mistake_is_named_before_a_model_is_loaded(config, capsys, no_model, changes, key, detail):
    for path, value in changes.items():
        put(config, path, value)
    message = mistake(capsys, config)
    assert key in message
    assert detail in message


@pytest.mark.parametrize(("class_name", "detail"), [("TooFew", "8"), ("Text", "good")])
def test_a_reward_that_returns_something_else_stops_the_run(config, capsys, no_step, class_name, detail):
    put(config, "trainer.callbacks", [{"class_path": f"own_rewards.{class_name}"}])
    message = mistake(capsys, config)
    assert "uneven" in message
    assert detail in message


def test_a_reward_function_that_returns_a_string_stops_the_run(config, capsys, no_step):
    put(
        config,
        "trainer.callbacks",
        [{"class_path": "FunctionReward", "init_args": {"function": "own_rewards.in_words"}}],
    )
    assert "in_words" in mistake(capsys, config)


def test_a_reward_function_that_always_raises_stops_the_run_with_its_own_line(config, capsys, no_step):
    put(
        config, "trainer.callbacks", [{"class_path": "FunctionReward", "init_args": {"function": "own_rewards.broken"}}]
    )
    message = mistake(capsys, config)
    assert "'broken'" in message
    assert "ZeroDivisionError" in message
    line = OWN_REWARDS.splitlines().index("    return [1 / 0 for _ in completions]") + 1
    assert f"own_rewards.py, line {line}, in " in message


def test_a_share_of_failures_that_is_none_stops_the_run(config, capsys, no_step):
    for rate in (-1.0, 2.0, float("nan")):
        put(config, "model.init_args.max_failure_rate", rate)
        assert f"model.max_failure_rate must be in [0, 1], got {rate}" in mistake(capsys, config)


def test_an_optimizer_that_its_package_lacks_is_named(config, capsys, no_model):
    message = mistake(capsys, config, "--model.optimizer", "torch.optim.Nope")
    assert "model.optimizer: cannot load the class 'torch.optim.Nope'" in message
    assert "GRPOModule" not in message


@pytest.mark.parametrize("group", ["checkpoint", "init_args.checkpoint"])
def test_a_strategys_name_with_settings_is_answered_with_its_class(config, capsys, no_model, group):
    message = mistake(capsys, config, "--trainer.strategy", "deepspeed_3", f"--trainer.strategy.{group}", "whole")
    assert "trainer.strategy: the name 'deepspeed_3' takes no settings" in message
    assert "{class_path: ZeROStrategy, init_args: {stage: 3, ...}}" in message


def test_settings_of_no_strategy_are_answered_with_the_classes(config, capsys, no_model):
    message = mistake(capsys, config, "--trainer.strategy.timeout_seconds", "5")
    assert "trainer.strategy is auto, which takes no settings" in message
    assert "{class_path: FSDP2Strategy, init_args: {...}}" in message


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_by_its_key(config, capsys, no_model):
    assert "error: trainer.accelerator: there is no GPU" in mistake(capsys, config, "--trainer.accelerator", "gpu")


def test_one_process_is_a_strategy(config):
    fit(config, "--trainer.strategy", "single", "--trainer.devices", "1")


def test_a_refused_strategys_name_with_settings_is_answered_with_the_reason(config, capsys, no_model):
    message = mistake(capsys, config, "--trainer.strategy", "fsdp", "--trainer.strategy.cpu_offload", "true")
    assert "trainer.strategy: fsdp is Lightning's older FSDP" in message


def test_an_accelerators_name_takes_no_settings(config, capsys, no_model):
    message = mistake(capsys, config, "--trainer.accelerator", "cpu", "--trainer.accelerator.cores", "1")
    assert "trainer.accelerator: 'cpu' is not the name of a class" in message


def test_a_stop_string_that_the_command_line_takes_for_a_comment_is_explained(config, capsys, no_model):
    message = mistake(capsys, config, "--model.sampling.stop", "#")
    assert "model.sampling.stop must be a list" in message
    assert "comment" in message


def test_a_reward_function_that_does_not_exist_is_named(config, capsys, no_model):
    put(
        config,
        "trainer.callbacks",
        [{"class_path": "FunctionReward", "init_args": {"function": "own_rewards.absent"}}],
    )
    assert "own_rewards.absent" in mistake(capsys, config)


def test_a_value_for_a_group_of_settings_is_refused_on_the_command_line_too(config, capsys, no_model):
    message = mistake(capsys, config, "--model.sampling", "3")
    assert "model.sampling must be a group of settings (temperature, " in message
    assert "got '3'" in message


def test_a_config_option_without_a_file_is_named(config, capsys, no_model):
    assert "--config must be followed by a file" in mistake(capsys, config, "--config")


def test_that_models_would_be_loaded_is_noticed(config, no_model):
    with pytest.raises(LoadedError):
        fit(config)


@pytest.fixture
def policy_without_tokenizer(config):
    """A folder that was a policy."""
    source = CharacterPolicy(**POLICY["init_args"])
    Policy(source.load_model(seed=0), source.load_tokenizer()).save(Path("policy"))
    for file in Path("policy").glob("tokenizer*"):
        file.unlink()
    return {"class_path": "PretrainedPolicy", "init_args": {"path": "./policy"}}


def test_a_folder_without_a_tokenizer_is_named(policy_without_tokenizer, config, capsys, no_model):
    put(config, "model.init_args.policy", policy_without_tokenizer)
    message = mistake(capsys, config)
    assert "model.policy.path" in message
    assert "tokenizer" in message


class TestDataFiles:
    """A file of JSON lines, and what can be wrong with it."""

    @pytest.fixture(autouse=True)
    def data(self, config, no_model):
        """A data file that is right, named in the config."""
        put(
            config,
            "data",
            {
                "class_path": "JSONLines",
                "init_args": {"train_path": "train.jsonl", "prompt_column": "question", "max_prompt_tokens": 8},
            },
        )
        self.write(ROWS)

    def write(self, rows, name="train.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test_a_missing_file(self, config, capsys):
        Path("train.jsonl").unlink()
        assert "train.jsonl" in mistake(capsys, config)

    def test_an_empty_file(self, config, capsys):
        Path("train.jsonl").write_text("")
        message = mistake(capsys, config)
        assert "train.jsonl" in message

    def test_a_line_that_is_not_json(self, config, capsys):
        lines = Path("train.jsonl").read_text().splitlines()
        lines[16] = '{"question": "1+'
        Path("train.jsonl").write_text("\n".join(lines))
        message = mistake(capsys, config)
        assert "train.jsonl" in message
        assert "17" in message

    def test_a_row_without_the_mapped_column(self, config, capsys):
        self.write([*ROWS[:4], {"prompt": "1+1="}, *ROWS[5:]])
        message = mistake(capsys, config)
        assert "question" in message
        assert "5" in message

    def test_prompts_longer_than_the_limit_are_counted(self, config, capsys):
        self.write([*ROWS, {"question": "1+1+1+1+1+1=", "answer": "6"}])
        message = mistake(capsys, config)
        assert "data.max_prompt_tokens" in message
        assert "1 of 21" in message
        assert "data.on_long_prompt" in message
        assert "train.jsonl:21" in message

    def test_prompts_longer_than_the_limit_are_dropped_where_that_is_wanted(self, config, caplog):
        self.write([*ROWS, {"question": "1+1+1+1+1+1=", "answer": "6"}])
        put(config, "data.init_args.on_long_prompt", "drop")
        with pytest.raises(LoadedError), caplog.at_level("INFO"):
            fit(config)
        assert "data.max_prompt_tokens: 1 of 21 prompts of the train split are longer than 8 tokens" in caplog.text

    @pytest.mark.parametrize("command", ["validate", "test", "predict"])
    def test_no_held_out_prompts_to_evaluate_on(self, config, capsys, command):
        put(config, "trainer.limit_val_batches", 1)
        Path("run.yaml").write_text(yaml.safe_dump(config))
        message = mistake_of(capsys, command, "--config", "run.yaml")
        assert "data: there are no held-out prompts to evaluate on" in message


def test_a_row_without_the_column_that_a_reward_reads_is_named_by_its_line(config, capsys, no_step):
    Path("train.jsonl").write_text("".join(json.dumps({"prompt": row["question"]}) + "\n" for row in ROWS))
    put(config, "data", {"class_path": "JSONLines", "init_args": {"train_path": "train.jsonl"}})
    put(config, "trainer.callbacks", [{"class_path": "ExactAnswer"}])
    assert "'answer', which train.jsonl:" in mistake(capsys, config)


class TestCheckpoints:
    """A checkpoint that does not belong to the run."""

    @pytest.fixture
    def checkpoint(self, config):
        put(config, "trainer.enable_checkpointing", True)
        put(config, "trainer.default_root_dir", "first")
        put(config, "trainer.max_steps", 1)
        fit(config)
        put(config, "trainer.default_root_dir", "second")
        put(config, "trainer.max_steps", 2)
        (path,) = Path("first").glob("**/*.ckpt")
        return str(path)

    def test_that_does_not_exist(self, config, capsys, no_model):
        assert "absent.ckpt" in mistake(capsys, config, "--ckpt_path", "absent.ckpt")

    @pytest.mark.parametrize("command", ["fit", "validate"])
    def test_the_best_of_no_run(self, config, capsys, no_model, command):
        Path("run.yaml").write_text(yaml.safe_dump(config))
        message = mistake_of(capsys, command, "--config", "run.yaml", "--ckpt_path", "best")
        assert "ckpt_path: a checkpoint is the best within a run alone" in message

    def test_of_another_model(self, config, capsys, checkpoint, no_step):
        put(config, "model.init_args.policy.init_args.hidden_size", 32)
        assert "ckpt_path" in mistake(capsys, config, "--ckpt_path", checkpoint)

    def test_of_another_program(self, config, capsys, checkpoint, no_step):
        torch.save({"state_dict": {}, "weights": {}}, "other.ckpt")
        assert "ckpt_path" in mistake(capsys, config, "--ckpt_path", "other.ckpt")

    def test_of_another_module(self, config, capsys, checkpoint, no_step):
        content = torch.load(checkpoint)
        torch.save({name: content[name] for name in content if name != "grpo_lightning"}, "other.ckpt")
        assert "ckpt_path" in mistake(capsys, config, "--ckpt_path", "other.ckpt")

    def test_that_is_no_checkpoint(self, config, capsys, no_step):
        Path("other.ckpt").write_text("hello")
        assert "other.ckpt" in mistake(capsys, config, "--ckpt_path", "other.ckpt")

    def test_that_was_cut_off(self, config, capsys, checkpoint, no_model):
        path = Path(checkpoint)
        path.write_bytes(path.read_bytes()[:-5])
        message = mistake(capsys, config, "--ckpt_path", checkpoint)
        assert f"ckpt_path: {path.absolute()} is torn: it has {path.stat().st_size:,} bytes" in message

    def test_of_which_a_bit_has_flipped(self, config, capsys, checkpoint, no_step):
        content = bytearray(Path(checkpoint).read_bytes())
        content[len(content) // 2] ^= 1
        Path(checkpoint).write_bytes(content)
        message = mistake(capsys, config, "--ckpt_path", checkpoint)
        assert f"ckpt_path: {Path(checkpoint).absolute()} is damaged" in message

    @pytest.fixture
    def steps(self, monkeypatch):
        """The optimizer's, one entry each."""
        made, step = [], torch.optim.AdamW.step

        def counted(self, *arguments, **settings):
            made.append(self)
            return step(self, *arguments, **settings)

        monkeypatch.setattr(torch.optim.AdamW, "step", counted)
        return made

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_of_those_that_a_run_finds_itself_torn_ones_are_skipped(self, config, steps):
        kept = {"dirpath": "kept", "save_top_k": -1, "save_last": True, "every_n_train_steps": 1}
        callbacks = [*config["trainer"]["callbacks"], {"class_path": "ModelCheckpoint", "init_args": kept}]
        put(config, "trainer.callbacks", callbacks)
        put(config, "trainer.enable_checkpointing", True)
        fit(config)
        for path in Path("kept").glob("*.ckpt"):
            if path.stem == "last" or path.stem.endswith("step=2"):
                path.write_bytes(path.read_bytes()[:-1])
        steps.clear()
        with pytest.warns(UserWarning, match=r"skipped, and the next older one looked for: .* is torn") as said:
            fit(config, "--ckpt_path", "last")
        assert sum("is skipped" in str(warning.message) for warning in said) == 2
        assert len(steps) == 1, "from the first step to the second"
        left = {path.name for path in Path("kept").iterdir() if path.suffix in (".ckpt", ".torn")}
        torn = {"epoch=0-step=2.ckpt.torn", "last.ckpt.torn"}
        assert left == {"epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "last.ckpt", *torn}

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_under_slurm_the_newest_whole_one_of_a_job_that_was_ended_is_taken(
        self, config, checkpoint, steps, monkeypatch
    ):
        put(config, "trainer.default_root_dir", ".")
        for number in (1, 2):
            write_file(torch.load(checkpoint), Path(f"hpc_ckpt_{number}.ckpt"))
        Path("hpc_ckpt_2.ckpt").write_text("")
        slurm = SimpleNamespace(detect=lambda: True)
        monkeypatch.setattr("grpo_lightning.checkpointing.search.SLURMEnvironment", slurm)
        steps.clear()
        with pytest.warns(UserWarning, match="hpc_ckpt_2.ckpt is skipped"):
            fit(config)
        assert len(steps) == 1

    def test_of_settings_that_cannot_be_resumed(self, config, capsys, checkpoint, no_step):
        put(config, "model.init_args.group_size", 4)
        message = mistake(capsys, config, "--ckpt_path", checkpoint)
        assert "model.group_size" in message

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    @pytest.mark.parametrize(
        ("arguments", "setting", "value", "said"),
        [
            (["--model.optimizer.lr=0.25"], "lr", 0.25, "lr: 0.25 (the checkpoint had 0.001)"),
            (
                ["--model.optimizer.weight_decay=0.5"],
                "weight_decay",
                0.5,
                "weight_decay: 0.5 (the checkpoint had 0.01)",
            ),
            # One of two steps has been made: half of the learning rate is left.
            (
                ["--model.schedule=Schedule", "--model.schedule.decay=linear"],
                "lr",
                5e-4,
                "lr by the schedule: 0.0005 (the checkpoint had 0.001)",
            ),
        ],
    )
    def test_settings_of_the_command_line_win_and_the_difference_is_said(
        self, config, checkpoint, caplog, monkeypatch, arguments, setting, value, said
    ):
        values = []

        def step(self, closure=None):
            values.append(self.param_groups[0][setting])
            return closure() if closure else None

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        fit(config, "--ckpt_path", checkpoint, *arguments)
        assert values == [value]
        assert said in caplog.text
