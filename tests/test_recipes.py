"""The shipped configs of hub models and data, on a local folder and a local file of the same format."""

import json
from pathlib import Path

import pytest

from grpo_lightning.cli import main
from grpo_lightning.policy import CharacterPolicy, Policy

CONFIGS = Path(__file__).parents[1] / "configs"
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
# An untrained policy neither stops by itself nor is ever right, and the alarms of these runs say so.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*\(TrainingAlarms says this once\.\)")
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture
def instruct_model(tmp_path, monkeypatch):
    """A tiny model with a chat template, in the current folder."""
    monkeypatch.chdir(tmp_path)
    source = CharacterPolicy(ALPHABET, hidden_size=16, num_layers=1, num_heads=2, max_positions=512)
    tokenizer = source.load_tokenizer()
    tokenizer.chat_template = CHAT
    Policy(source.load_model(seed=0), tokenizer).save(tmp_path / "model")
    return "model"


def train(config, *arguments):
    small = ["--model.prompts_per_iteration=2", "--model.group_size=4", "--model.sampling.max_new_tokens=12"]
    trainer = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=2"]
    trainer += ["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    main(["fit", "--config", str(CONFIGS / config), *small, *trainer, *arguments])
    return json.loads(next(Path("runs").rglob("summary.json")).read_text())


def test_gsm8k(instruct_model):
    Path("data").mkdir()
    rows = [{"question": f"What is {i} and 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(12)]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = ["--data.path=data", "--data.configuration=null"]
    summary = train("gsm8k.yaml", f"--model.policy.path={instruct_model}", *data)
    assert summary["iterations"] == 3


def test_reasoning_gym(instruct_model):
    data = ["--data.num_train=20", "--data.num_validation=4"]
    summary = train("reasoning_gym.yaml", f"--model.policy.path={instruct_model}", *data)
    assert summary["iterations"] == 3
    assert summary["heldout_accuracy_before"] is not None
