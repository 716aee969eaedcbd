import re
from datetime import timedelta
from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from torch import nn

from grpo_lightning.strategies import WHOLE, FSDP1Strategy, FSDP2Strategy, ZeROStrategy, placement_of
from grpo_lightning.types import ConfigurationError


@pytest.mark.parametrize("strategy", [DDPStrategy(), SingleDeviceStrategy()], ids=lambda s: type(s).__name__)
def test_the_weights_are_whole_unless_a_strategy_says_otherwise(strategy):
    assert placement_of(strategy) is WHOLE


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_a_strategy_that_shards_without_telling_is_refused(strategy):
    unset = strategy.__new__(strategy)  # nothing of it is asked for, and DeepSpeed may not be installed
    with pytest.raises(ConfigurationError, match=rf"trainer.strategy: {strategy.__name__}.*fsdp2"):
        placement_of(unset)


@pytest.mark.parametrize(("name", "kind"), [("fsdp1", FSDP1Strategy), ("fsdp2", FSDP2Strategy)])
def test_a_strategy_that_shards_has_a_name_of_its_own(name, kind):
    assert type(StrategyRegistry.get(name)) is kind


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_of_zero_has_a_name_of_its_own(stage):
    strategy = StrategyRegistry.get(f"deepspeed_{stage}")
    assert type(strategy) is ZeROStrategy
    assert strategy.config["zero_optimization"]["stage"] == stage


def test_zero_says_what_to_install(monkeypatch):
    monkeypatch.setattr("grpo_lightning.strategies.zero.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"trainer.strategy: .*pip install 'grpo_lightning\[deepspeed\]'"):
        ZeROStrategy(stage=2)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
def test_zero_has_no_sharded_checkpoints():
    with pytest.raises(ConfigurationError, match=r"trainer.strategy.checkpoint: sharded is not for deepspeed_3"):
        ZeROStrategy(stage=3, checkpoint="sharded")


NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")


@pytest.mark.parametrize("strategy", [FSDP2Strategy, pytest.param(ZeROStrategy, marks=NEEDS_DEEPSPEED)])
class TestCommunication:
    """Settings that are refused, or handed to Lightning."""

    @pytest.mark.parametrize(
        "backend", ["glooo", "undefined", "cpu:gloo,cuda:ncl", "fake", "cpu:gloo,foo:gloo", "cpu:nccl"]
    )
    def test_a_backend_that_is_not_there(self, strategy, backend):
        with pytest.raises(
            ConfigurationError, match=rf"trainer.strategy.process_group_backend must be .*gloo.* got {backend}"
        ):
            strategy(process_group_backend=backend)

    @pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"])
    def test_a_backend_that_is_there(self, strategy, backend):
        assert strategy(process_group_backend=backend)._process_group_backend == backend

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e-9, 1e14, 1e300, None])
    def test_a_timeout_that_is_none(self, strategy, seconds):
        with pytest.raises(
            ConfigurationError,
            match=rf"trainer.strategy.timeout_seconds must be in \[1, .*, got {re.escape(str(seconds))}",
        ):
            strategy(timeout_seconds=seconds)

    def test_a_timeout(self, strategy):
        assert strategy(timeout_seconds=90)._timeout == timedelta(seconds=90)


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_2", "deepspeed_stage_3_offload"])
def test_a_name_of_lightnings_own_says_which_to_set(name):
    with pytest.raises(ConfigurationError, match=f"trainer.strategy: {name} .*deepspeed_1, deepspeed_2 or deepspeed_3"):
        Trainer(strategy=name, accelerator="cpu", logger=False)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload"])
def test_the_older_fsdp_says_which_to_set(name):
    with pytest.raises(ConfigurationError, match=f"trainer.strategy: {name} is Lightning's older FSDP.*set fsdp2"):
        StrategyRegistry.get(name)  # on a CPU, the Trainer asks for a GPU before it comes to this


def test_the_norm_of_a_gradient_is_that_of_all_its_parts():
    # 1 + 4 + 4 + 16 = 25; a weight without a gradient has no part in it
    weights = [nn.Parameter(torch.zeros(n)) for n in (2, 2, 1)]
    weights[0].grad, weights[1].grad = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    norm = WHOLE.gradient_norm(weights)
    assert norm.item() == 5.0
    assert norm.dtype == torch.float64
