import pytest
import torch

from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.rollout.attention import AttentionPattern
from grpo_lightning.rollout.cache import RowCache
from grpo_lightning.rollout.prefix import SharingCache
from grpo_lightning.rollout.sharing import can_share, tokens_saved
from grpo_lightning.types import ConfigurationError, GenerationRequest, SamplingParams

EOS = frozenset({1})


def request(prompt, num_completions):
    return GenerationRequest(slot=0, token_ids=tuple(prompt), num_completions=num_completions)


def generated(model, tokenizer, coordinates, requests, **settings):
    engine = InProcessEngine(**settings)
    engine.setup(model, tokenizer, EOS)
    return engine, engine.generate(requests, SamplingParams(max_new_tokens=24), coordinates)


def test_the_saving_is_worked_by_hand():
    # 3 copies of 2 tokens and 1 of 3: 9 tokens for 6 completions. A prompt drawn twice is one prompt.
    assert tokens_saved([request([5, 6], 4), request([7, 8, 9], 2)]) == 9 / 6
    assert tokens_saved([request([5, 6], 2), request([5, 6], 2), request([7, 8, 9], 2)]) == 9 / 6
    assert tokens_saved([request([5, 6, 7], 1)]) == 0
    assert tokens_saved([]) == tokens_saved([request([5], 0)]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_family_can_share(make_model, family, dtype):
    model = make_model(family, dtype)
    before = model.config._attn_implementation
    assert can_share(model, AttentionPattern.of(model.config))
    assert model.config._attn_implementation == before


def test_a_model_that_keeps_the_prompts_to_itself_cannot_share(make_model):
    model = make_model()
    plain = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, prefixes=None, **kwargs: plain(*args, **kwargs)
    assert not can_share(model, AttentionPattern.of(model.config))


def test_a_model_that_reads_something_else_cannot_share(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr("grpo_lightning.rollout.prefix.join", lambda one, other: one.output)
    assert not can_share(model, AttentionPattern.of(model.config))


@pytest.mark.parametrize("max_rows", [None, 4])
def test_sharing_changes_no_token(make_model, tokenizer, coordinates, ragged_requests, max_rows):
    model = make_model()
    engine, shared = generated(model, tokenizer, coordinates, ragged_requests, share_prompts_from=0, max_rows=max_rows)
    assert isinstance(engine._cache, SharingCache)
    engine, copied = generated(model, tokenizer, coordinates, ragged_requests, share_prompts_from=None)
    assert type(engine._cache) is RowCache
    assert [c.token_ids for c in shared] == [c.token_ids for c in copied]


def test_short_prompts_and_single_completions_are_not_shared(make_model, tokenizer, coordinates):
    long = [5 + i % 50 for i in range(40)]
    for requests, kind in (
        ([request(long, 2)], SharingCache),  # 20 tokens saved per completion
        ([request(long, 1)], RowCache),
        ([request(long[:15], 9)], RowCache),  # 13.3
    ):
        engine, _ = generated(make_model(), tokenizer, coordinates, requests, share_prompts_from=16)
        assert type(engine._cache) is kind


def test_a_window_that_cuts_into_the_prompt_is_not_shared(make_model, tokenizer, coordinates):
    engine, _ = generated(
        make_model("mistral-sliding"), tokenizer, coordinates, [request([5, 6], 3)], share_prompts_from=0
    )
    assert type(engine._cache) is RowCache


def test_a_model_that_cannot_share_gets_copies(make_model, tokenizer, coordinates, ragged_requests, monkeypatch):
    monkeypatch.setattr("grpo_lightning.rollout.inprocess.can_share", lambda model, pattern: False)
    engine, _ = generated(make_model(), tokenizer, coordinates, ragged_requests, share_prompts_from=0)
    assert type(engine._cache) is RowCache


def test_a_negative_threshold_is_refused():
    with pytest.raises(ConfigurationError, match=r"model\.engine\.share_prompts_from must be >= 0 or null, got -1"):
        InProcessEngine(share_prompts_from=-1)
