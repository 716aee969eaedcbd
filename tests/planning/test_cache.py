"""The keys and values of a rollout: against the engine's buffers, and by hand."""

import pytest
import torch

from grpo_lightning.planning.budget import decoder_of
from grpo_lightning.planning.cache import cache_bytes, columns
from grpo_lightning.policy import CharacterPolicy, Policy
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.rollout.prefix import SharedPrefixes
from grpo_lightning.types import Coordinates, GenerationRequest, SamplingParams, Stream

WHERE = Coordinates(seed=0, stream=Stream.TRAINING, iteration=0)


@pytest.fixture(scope="module")
def policy():
    source = CharacterPolicy(hidden_size=16, num_layers=2, num_heads=2, max_positions=512)
    return Policy(source.load_model(seed=0), source.load_tokenizer())


def measured(policy, monkeypatch, *, prompts, group_size, prompt_tokens, new_tokens, max_rows, shares):
    """The most bytes that the engine's buffers had."""
    most = [0]
    engine = InProcessEngine(max_rows=max_rows, share_prompts_from=0 if shares else None)
    arrange = SharedPrefixes._arrange

    def watched(prefixes):
        arrange(prefixes)
        most[0] = max(most[0], sum(buffer.nbytes for buffer in (*prefixes._keys, *prefixes._values)))

    engine.setup(policy.model, policy.tokenizer, frozenset())  # nothing ends a completion
    engine.generate([], SamplingParams(max_new_tokens=1), WHERE)  # asks the model what it can
    monkeypatch.setattr(SharedPrefixes, "_arrange", watched)
    requests = [
        GenerationRequest(slot=i, token_ids=(3 + i,) * prompt_tokens, num_completions=group_size)
        for i in range(prompts)
    ]
    engine.generate(requests, SamplingParams(max_new_tokens=new_tokens), WHERE)
    return most[0] + sum(storage.nbytes for storage in engine._cache._storage)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("max_rows", [8, None])
@pytest.mark.parametrize("new_tokens", [20, 70])
def test_the_buffers_are_those_of_the_engine(policy, monkeypatch, shares, max_rows, new_tokens):
    demand = {"prompts": 4, "group_size": 4, "prompt_tokens": 30, "new_tokens": new_tokens, "max_rows": max_rows}
    decoder = decoder_of(policy.model, itemsize=4)
    token = 2 * decoder.layers * decoder.keys * 4
    found = cache_bytes(**demand, shares=shares, token=token)
    real = measured(policy, monkeypatch, **demand, shares=shares)
    # One prompt more than is ever live may be counted, and blocks of steps may need a growth more.
    assert real <= found.held <= real * 1.1


def test_a_shared_prompt_is_held_once():
    # 2 prompts of 100 columns, and 8 rows of the 64 columns that a buffer begins with; 10 bytes each
    demand = {"prompts": 2, "group_size": 4, "prompt_tokens": 100, "new_tokens": 50, "max_rows": None, "token": 10}
    assert cache_bytes(**demand, shares=True).held == (2 * 100 + 8 * 64) * 10
    assert cache_bytes(**demand, shares=False).held == 8 * 164 * 10


def test_rows_bound_the_cache():
    demand = {"prompts": 100, "group_size": 4, "prompt_tokens": 100, "new_tokens": 50, "token": 1}
    # 8 rows of 2 prompts; a third one may enter while the first still has a row
    assert cache_bytes(**demand, max_rows=8, shares=True).held == 3 * 100 + 8 * 64


def test_buffers_grow_by_half():
    assert columns(0, 64) == (64, 0)
    assert columns(0, 65) == (128, 64)
    assert columns(0, 200) == (288, 192)  # 64, 128, 192, 288
    assert columns(100, 100) == (164 + 82, 164)


def test_growth_holds_the_old_buffers_and_a_copy():
    demand = {"prompts": 1, "group_size": 2, "prompt_tokens": 10, "new_tokens": 65, "max_rows": None, "token": 1}
    assert cache_bytes(**demand, shares=True).growing == 2 * 2 * 64


def test_a_half_precision_token_takes_half():
    model = CharacterPolicy(hidden_size=16, num_layers=2, num_heads=2).load_skeleton()
    assert model.device == torch.device("meta")
    assert decoder_of(model, 2).keys == decoder_of(model, 4).keys == 16
