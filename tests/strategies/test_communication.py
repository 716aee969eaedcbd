"""Whether ranks can exchange what lies on their devices, under any strategy."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from grpo_lightning.strategies import FSDP2Strategy
from grpo_lightning.strategies.communication import check_communication
from grpo_lightning.types import ConfigurationError


def of(strategy):
    """The strategy of a Trainer on a CPU, which has begun nothing."""
    return Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False).strategy


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo", "cpu:gloo,cuda:gloo", "GLOO"])
@pytest.mark.parametrize("strategy", [DDPStrategy, FSDP2Strategy])
def test_a_backend_for_the_device(strategy, backend):
    check_communication(of(strategy(process_group_backend=backend)))


@pytest.mark.parametrize("strategy", [DDPStrategy, FSDP2Strategy])
def test_a_backend_for_another_device(strategy):
    with pytest.raises(ConfigurationError, match=r"process_group_backend: cuda:gloo exchanges nothing .* the kind cpu"):
        check_communication(of(strategy(process_group_backend="cuda:gloo")))


@pytest.mark.parametrize("backend", ["fake", "foo", "foo:gloo"])
def test_a_strategy_of_lightnings_own_is_looked_at_too(backend):
    with pytest.raises(ConfigurationError, match=rf"trainer.strategy.process_group_backend must be .* got {backend}"):
        check_communication(of(DDPStrategy(process_group_backend=backend)))


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="NCCL is there")
def test_nccl_where_there_is_none():
    with pytest.raises(ConfigurationError, match=r"trainer.strategy.process_group_backend .* got nccl"):
        check_communication(of(DDPStrategy(process_group_backend="nccl")))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_ranks_that_would_be_given_a_pickled_run(method):
    with pytest.raises(ConfigurationError, match=rf"trainer.strategy.start_method: {method} .* Set popen"):
        check_communication(of(DDPStrategy(start_method=method)))


def test_one_process_has_nobody_to_talk_to():
    check_communication(Trainer(accelerator="cpu", devices=1, logger=False).strategy)
