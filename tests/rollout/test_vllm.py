"""What `VLLMEngine` says before vLLM is started, and how it asks for completions."""

import importlib.util

import pytest
import torch

from grpo_lightning.rollout import VLLMEngine
from grpo_lightning.rollout.vllm import completion_seeds, finish_reason, vllm_sampling
from grpo_lightning.types import ConfigurationError, FinishReason, GenerationRequest, SamplingParams


def test_a_missing_vllm_is_said_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"model\.engine needs vLLM.*pip install 'grpo_lightning\[vllm\]'"):
        VLLMEngine()


@pytest.mark.parametrize(("settings", "key"), [
    ({"max_num_seqs": 0}, "max_num_seqs must be >= 1, got 0"),
    ({"max_model_len": -1}, "max_model_len must be >= 1 or null, got -1"),
    ({"kv_cache_gib": -1}, "kv_cache_gib must be > 0 and finite, or null, got -1"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size must be >= 1, got 0"),
    ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, key):
    with pytest.raises(ConfigurationError, match=f"model.engine.{key}"):
        VLLMEngine(**settings)


def test_ranks_that_do_not_come_out_even_are_refused(monkeypatch, make_model, tokenizer):
    monkeypatch.setattr("grpo_lightning.rollout.vllm.require_vllm", lambda: None)
    monkeypatch.setattr("grpo_lightning.rollout.vllm.num_ranks", lambda: 3)
    engine = VLLMEngine(tensor_parallel_size=2)
    engine.setup(make_model(dtype=torch.float32), tokenizer, frozenset({1}))
    with pytest.raises(ConfigurationError, match=r"tensor_parallel_size: 3 ranks do not come out even in engines of 2"):
        engine.start()


def test_a_temperature_that_vllm_refuses_is_said():
    with pytest.raises(ConfigurationError, match=r"model\.sampling\.temperature must be at most 2 with vLLM, got 3\.0"):
        vllm_sampling(SamplingParams(temperature=3.0), frozenset({1}))


def test_a_seed_depends_on_its_own_coordinates_alone(coordinates):
    requests = [GenerationRequest(slot=s, token_ids=(1,), num_completions=n) for s, n in ((7, 3), (2, 5))]
    seeds = completion_seeds(requests, coordinates)
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[3:6] == completion_seeds([GenerationRequest(slot=2, token_ids=(9,), num_completions=3)], coordinates)
    assert completion_seeds([], coordinates) == []


@pytest.mark.parametrize(("tokens", "has_stopped", "reason"), [
    ((5, 1), True, FinishReason.EOS),
    ((5, 1), False, FinishReason.EOS),  # at the limit
    ((5, 6), True, FinishReason.STOP),
    ((5, 6), False, FinishReason.LENGTH),
])  # fmt: skip
def test_why_a_completion_ended(tokens, has_stopped, reason):
    assert finish_reason(tokens, frozenset({1}), has_stopped=has_stopped) is reason


def test_the_precision_is_the_policys(monkeypatch, make_model, tokenizer):
    monkeypatch.setattr("grpo_lightning.rollout.vllm.require_vllm", lambda: None)
    for own, asked, expected in [
        (torch.float64, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
    ]:
        engine = VLLMEngine(dtype=asked)
        engine.setup(make_model(dtype=own), tokenizer, frozenset({1}))
        assert engine.dtype is expected
