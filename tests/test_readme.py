"""The README's example runs."""

import re
from pathlib import Path

import pytest
import torch

from grpo_lightning.policy import CharacterPolicy, Policy

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The Python example with tiny settings, beside a tiny policy."""
    monkeypatch.chdir(tmp_path)
    source = CharacterPolicy(hidden_size=16, num_layers=1, num_heads=2, max_positions=128)
    Policy(source.load_model(seed=0), source.load_tokenizer()).save(Path("runs/quickstart/cold_start/policy"))
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "GRPOModule" in block)
    quiet = "logger=False, enable_progress_bar=False, enable_checkpointing=False, limit_val_batches=0"
    for setting, tiny in {
        "max_new_tokens=48": "max_new_tokens=4",
        "32, group_size=8": "2, group_size=2",
        "max_steps=100": f"max_steps=1, accelerator='cpu', log_every_n_steps=1, {quiet}",
        "max_value=9)": "max_value=9, num_train=8, num_validation=4, num_test=4, num_demonstrations=8)",
    }.items():
        assert setting in code
        code = code.replace(setting, tiny)
    return code


def test_the_python_example_trains(example):
    names = {}
    exec(example, names)
    assert names["trainer"].global_step == 1
    assert names["module"].iteration == 1


def test_the_python_example_is_ten_lines(example):
    statements = [line for line in example.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(statements) <= 10


def test_the_readme_names_files_that_exist():
    root = Path(__file__).parents[1]
    for name in re.findall(r"configs/[\w-]+\.yaml|tools/[\w-]+\.txt|[A-Z]+\.md", README):
        assert (root / name).is_file(), name


@pytest.fixture(autouse=True)
def one_thread():
    """The example is tiny; more threads would only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
