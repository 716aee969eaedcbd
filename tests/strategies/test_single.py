"""The strategy `single`: one process, on the device that the Trainer names."""

import pytest
import torch
from lightning.pytorch import Trainer

from grpo_lightning.strategies import WHOLE, SingleStrategy, placement_of
from grpo_lightning.types import ConfigurationError


def test_a_trainer_takes_it_by_its_name():
    trainer = Trainer(strategy="single", accelerator="cpu", devices=1, logger=False)
    assert type(trainer.strategy) is SingleStrategy
    assert (trainer.world_size, trainer.strategy.root_device) == (1, torch.device("cpu"))
    assert placement_of(trainer.strategy) is WHOLE


def test_it_takes_the_trainers_device():
    strategy = SingleStrategy()
    strategy.parallel_devices = [torch.device("cuda", 1)]
    assert strategy.root_device == torch.device("cuda", 1)


def test_two_devices_are_refused():
    with pytest.raises(ConfigurationError, match=r"trainer\.strategy: single is one process, .* gives 2"):
        Trainer(strategy="single", accelerator="cpu", devices=2, logger=False)
