"""Mistakes in the Trainer's settings are told with their key."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from grpo_lightning.strategies import NAMES
from grpo_lightning.trainer_errors import check_strategy_name, with_key
from grpo_lightning.types import ConfigurationError


@pytest.mark.parametrize("strategy", [*NAMES, "DDP", "fsdp", "ddp_find_unused_parameters_true", object()])
def test_a_strategy_that_is_known_by_its_name_or_has_settings(strategy):
    check_strategy_name(strategy)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("FSDP2Strategy", r"FSDP2Strategy is a class, .* \{class_path: FSDP2Strategy\}"),
        ("DDPStrategy", r"give --trainer\.strategy\.class_path DDPStrategy"),
        ("fspd1", r"no strategy is called 'fspd1'; did you mean 'fsdp1'\? There are auto, single, ddp"),
        ("fsdp3", "did you mean 'fsdp"),
        ("depspeed_3", "did you mean 'deepspeed_3'"),
        ("pp", r"no strategy is called 'pp'\. There are auto"),
    ],
)
def test_a_strategy_that_is_none(strategy, said):
    with pytest.raises(ConfigurationError, match=rf"trainer\.strategy: .*{said}"):
        check_strategy_name(strategy)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"max_steps": -3}, "trainer.max_steps: "),
        ({"max_epochs": -3}, "trainer.max_epochs: "),
        ({"devices": 0}, "trainer.devices: "),
        ({"accelerator": "foo"}, "trainer.accelerator: "),
        ({"barebones": True, "fast_dev_run": True}, "trainer.barebones: "),
    ],
)
def test_what_lightning_says_gets_its_key(settings, key):
    with pytest.raises((MisconfigurationException, ValueError)) as refused:
        Trainer(**{"accelerator": "cpu", "logger": False, **settings})
    assert str(with_key(refused.value)).startswith(key)


def test_a_gpu_that_is_not_there():
    said = str(with_key(MisconfigurationException("No supported gpu backend found!")))
    assert said == "trainer.accelerator: there is no GPU that torch can use, got gpu. Set auto or cpu."


def test_what_has_its_key_keeps_it():
    error = ConfigurationError("trainer.strategy.timeout_seconds must be")
    assert with_key(error) is error
