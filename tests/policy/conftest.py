import pytest

from grpo_lightning.policy import CharacterPolicy, Policy


@pytest.fixture
def source():
    """A tiny policy over digits."""
    return CharacterPolicy("0123456789+=", hidden_size=16, num_layers=2, num_heads=2, max_positions=32)


@pytest.fixture
def policy(source):
    return Policy(source.load_model(seed=0), source.load_tokenizer())
