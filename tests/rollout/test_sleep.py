"""`VLLMEngine` that gives its memory back between rollouts. vLLM itself is a stand-in: it sleeps on GPUs only."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from real_server import needs_vllm

from grpo_lightning.policy import NamedWeights
from grpo_lightning.rollout import InProcessEngine, VLLMEngine
from grpo_lightning.rollout.weight_receiver import WeightReceiver
from grpo_lightning.types import ConfigurationError, SamplingParams

EOS = frozenset({1})
SAMPLING = SamplingParams(max_new_tokens=6)


class SleepyLLM:
    """What a vLLM holds and does while it is awake."""

    def __init__(self, model):
        self.level = 0
        self.calls = []
        self.model = deepcopy(model)
        parameters = dict(self.model.named_parameters())
        self.model.load_weights = lambda named: [parameters[name].copy_(tensor) for name, tensor in named]
        self.worker = object.__new__(WeightReceiver)
        self.worker.model_runner = SimpleNamespace(get_model=lambda: self.model)

    def collective_rpc(self, method, args=()):
        assert not self.level, "asleep"
        if method == "receive_weights":
            named, version = args
            args = list(named), version
            self.calls.append(f"{len(args[0])} tensors")
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self):
        return True

    def sleep(self, level):
        assert not self.level, "asleep already"
        self.level = level
        self.calls.append("sleep")

    @torch.no_grad()
    def wake_up(self):
        assert self.level, "awake already"
        if self.level == 2:
            for parameter in self.model.parameters():
                parameter.zero_()
        self.level = 0
        self.calls.append("wake up")


class SleepyEngine(VLLMEngine):
    def start(self):
        return SleepyLLM(self._model)

    def draw(self, requests, sampling, coordinates):
        assert not self._llm.level, "asleep"
        self._llm.calls.append("draw")
        inner = InProcessEngine()
        inner.setup(self._llm.model, self._tokenizer, self._eos_token_ids)
        inner.update_weights((), self.version)
        return inner.generate(requests, sampling, coordinates)


@pytest.fixture
def of_level(monkeypatch, make_model, tokenizer, ragged_requests, coordinates):
    """An engine that sleeps at a level, and a rollout after each of three updates of its model, and one after none."""
    monkeypatch.setattr("grpo_lightning.rollout.vllm.require_vllm", lambda: None)
    monkeypatch.setattr("grpo_lightning.rollout.vllm.require_sleep", lambda: None)

    def run(level):
        model, engine = make_model(dtype=torch.float32), SleepyEngine(sleep_level=level)
        engine.setup(model, tokenizer, EOS)
        completions = []
        for version in (0, 1, 2, 2):
            if version > engine.version:
                with torch.no_grad():
                    model.lm_head.weight.add_(0.01)
            engine.update_weights(NamedWeights(model), version)
            completions.append(engine.generate(ragged_requests, SAMPLING, coordinates))
        return engine, completions

    return run


WHAT_HAPPENS = {
    0: "21 tensors, draw, 1 tensors, draw, 1 tensors, draw, 0 tensors, draw",
    1: "21 tensors, draw, sleep, "
    "wake up, 1 tensors, draw, sleep, wake up, 1 tensors, draw, sleep, wake up, 0 tensors, draw, sleep",
    2: "21 tensors, draw, sleep, "
    "wake up, 21 tensors, draw, sleep, wake up, 21 tensors, draw, sleep, wake up, 21 tensors, draw, sleep",
}


@pytest.mark.parametrize("level", WHAT_HAPPENS)
def test_vllm_is_awake_only_while_it_is_needed(of_level, level):
    engine, _ = of_level(level)
    assert ", ".join(engine._llm.calls) == WHAT_HAPPENS[level]
    assert engine._llm.level == level


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_changes_no_completion(of_level, level):
    assert of_level(level)[1] == of_level(0)[1]


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match=r"model\.engine\.sleep_level must be 0, 1 or 2, got 3"):
        VLLMEngine(sleep_level=3)


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="it can sleep here")
def test_a_VLLM_without_a_gpu_cannot_sleep():
    with pytest.raises(ConfigurationError, match=r"model\.engine\.sleep_level: vLLM cannot sleep on cpu"):
        VLLMEngine(sleep_level=1)
