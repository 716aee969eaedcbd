import pytest

from grpo_lightning.batching import IterationShape
from grpo_lightning.types import ConfigurationError

NUMBERS = {"prompts_per_iteration": 12, "group_size": 4, "num_epochs": 2, "num_minibatches": 3}


def test_an_iteration_by_hand():
    shape = IterationShape(**NUMBERS)
    assert shape.num_updates == 6  # 2 epochs of 3 minibatches
    assert shape.prompts_per_minibatch == 4  # 12 / 3


def test_settings_go_by_their_yaml_keys():
    assert IterationShape(**NUMBERS).settings == {
        "model.prompts_per_iteration": 12,
        "model.group_size": 4,
        "model.num_epochs": 2,
        "model.num_minibatches": 3,
    }


@pytest.mark.parametrize(
    ("name", "least"), [("prompts_per_iteration", 1), ("group_size", 2), ("num_epochs", 1), ("num_minibatches", 1)]
)
def test_a_number_that_is_too_small_is_named(name, least):
    IterationShape(**{**NUMBERS, name: least})
    with pytest.raises(ConfigurationError, match=rf"model\.{name} must be >= {least}, got {least - 1}\."):
        IterationShape(**{**NUMBERS, name: least - 1})
