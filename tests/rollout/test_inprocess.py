import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.types import ConfigurationError, FinishReason, GenerationRequest, SamplingParams

EOS = frozenset({1})
SAMPLING = SamplingParams(max_new_tokens=24)


def attached(model, tokenizer, eos=EOS, **kwargs):
    engine = InProcessEngine(**kwargs)
    engine.setup(model, tokenizer, eos)
    return engine


def tokens(completions):
    return [completion.token_ids for completion in completions]


def fed(model):
    """The shape of the input of every forward, as they come."""
    shapes = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def reference(model, requests, sampling, coordinates, slow_tokens):
    return [
        slow_tokens(model, r.token_ids, r.slot, i, sampling, coordinates)
        for r in requests
        for i in range(r.num_completions)
    ]


@pytest.mark.parametrize("sampling", [
    SAMPLING,
    SamplingParams(max_new_tokens=80, temperature=0.9),  # longer than a block of random numbers
    SamplingParams(max_new_tokens=30, min_new_tokens=5, temperature=2.0),
])  # fmt: skip
def test_tokens_are_those_of_a_decoder_without_cache_or_batch(make_model, tokenizer, coordinates, ragged_requests,
                                                              slow_tokens, sampling):  # fmt: skip
    model = make_model()
    expected = reference(model, ragged_requests, sampling, coordinates, slow_tokens)
    for max_rows in (None, 1, 4, 7):
        engine = attached(model, tokenizer, max_rows=max_rows)
        assert tokens(engine.generate(ragged_requests, sampling, coordinates)) == expected


def test_every_family_draws_the_tokens_of_a_plain_forward(make_model, tokenizer, coordinates, ragged_requests,
                                                          slow_tokens, family):  # fmt: skip
    model = make_model(family)
    expected = reference(model, ragged_requests, SAMPLING, coordinates, slow_tokens)
    for max_rows in (None, 4):
        engine = attached(model, tokenizer, max_rows=max_rows)
        assert tokens(engine.generate(ragged_requests, SAMPLING, coordinates)) == expected


def test_single_precision_tokens_hardly_ever_depend_on_the_batch(make_model, tokenizer, coordinates):
    # Measured by tools/measure_token_flips.py: 4.3e-6 flips per token, 1.5e-5 with the largest weights. Of the at most
    # 3,072 tokens here 0.05 are expected to flip; that two do so has a probability of 1e-3, and the draws are fixed.
    model = make_model(dtype=torch.float32)
    requests = [GenerationRequest(slot=i, token_ids=tuple(range(3, 5 + i)), num_completions=8) for i in range(16)]
    whole = attached(model, tokenizer).generate(requests, SAMPLING, coordinates)
    few = attached(model, tokenizer, max_rows=11).generate(requests, SAMPLING, coordinates)
    assert sum(a != b for a, b in zip(tokens(whole), tokens(few), strict=True)) <= 1


@pytest.mark.parametrize("max_rows", [None, 5])
def test_each_distinct_prompt_is_read_once(make_model, tokenizer, coordinates, ragged_requests, max_rows):
    model = make_model()
    shapes = fed(model)
    # No end of sequence: all 18 completions take 23 forwards of one token after the first.
    engine = attached(model, tokenizer, eos=frozenset(), max_rows=max_rows)
    engine.generate(ragged_requests, SAMPLING, coordinates)
    assert sum(rows for rows, length in shapes if length > 1) + shapes.count((1, 1)) >= 5
    prompt_tokens = sum(rows * length for rows, length in shapes) - 18 * 23
    distinct = {request.token_ids for request in ragged_requests}
    padded = len(distinct) * max(map(len, distinct))
    assert sum(map(len, distinct)) <= prompt_tokens <= padded


def test_groups_are_not_multiplied_before_their_prompt_is_read(make_model, tokenizer, coordinates):
    model = make_model()
    engine = attached(model, tokenizer)
    request = GenerationRequest(slot=0, token_ids=tuple(range(3, 33)), num_completions=16)
    engine.generate([request], replace(SAMPLING, max_new_tokens=2), coordinates)  # asks whether prompts can be shared
    shapes = fed(model)
    engine.generate([request], replace(SAMPLING, max_new_tokens=2), coordinates)
    assert shapes[0] == (1, 30)
    assert len(shapes) == 2


def test_finished_rows_leave_the_batch(make_model, tokenizer, coordinates, ragged_requests):
    model = make_model()
    shapes = fed(model)
    sampling = replace(SAMPLING, temperature=2.0, max_new_tokens=60)
    completions = attached(model, tokenizer).generate(ragged_requests, sampling, coordinates)
    lengths = Counter(len(c.token_ids) for c in completions)
    assert len(lengths) > 5
    decoded = [rows for rows, length in shapes[1:] if length == 1]
    # Step t feeds the token t of every completion that has one more.
    assert decoded == [sum(n for length, n in lengths.items() if length > t) for t in range(1, max(lengths))]


def test_no_more_than_max_rows_are_decoded_and_places_do_not_stay_empty(make_model, tokenizer, coordinates):
    model = make_model()
    shapes = fed(model)
    requests = [GenerationRequest(slot=i, token_ids=(5, 6 + i), num_completions=10) for i in range(10)]
    engine = attached(model, tokenizer, max_rows=8)
    completions = engine.generate(requests, replace(SAMPLING, temperature=2.0), coordinates)
    decoded = [rows for rows, length in shapes if length == 1]
    assert max(decoded) == 8
    assert sum(decoded) == sum(len(c.token_ids) - 1 for c in completions)
    # All but the last rows find company: a step less full than this only while nothing waits.
    assert sum(rows == 8 for rows in decoded) > 0.8 * len(decoded)


def test_training_mode_is_left_as_it_was(make_model, tokenizer, coordinates, ragged_requests):
    model = make_model()
    engine = attached(model, tokenizer)
    for training in (True, False):
        model.train(training)
        model.model.layers[0].eval()
        before = [module.training for module in model.modules()]
        engine.generate(ragged_requests[:1], SAMPLING, coordinates)
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()


def test_the_policy_can_be_trained_on_between_rollouts(make_model, tokenizer, coordinates, ragged_requests):
    model = make_model().train()
    engine = attached(model, tokenizer)
    first = engine.generate(ragged_requests, SAMPLING, coordinates)
    model(input_ids=torch.tensor([first[0].token_ids])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == first


def test_half_precision_reports_what_the_model_says(make_model, tokenizer, coordinates, ragged_requests,
                                                    teacher_forced):  # fmt: skip
    model = make_model(dtype=torch.bfloat16)
    completions = attached(model, tokenizer, max_rows=5).generate(ragged_requests, SAMPLING, coordinates)
    for i, completion in enumerate(completions):
        expected = teacher_forced(model, ragged_requests[i // 3].token_ids, completion.token_ids)
        # bfloat16 has 8 bits: logits of up to 4 are known to about 0.03.
        assert completion.sampler_logprobs == pytest.approx(expected.tolist(), abs=0.1)


def test_autocast_is_taken_as_it_comes(make_model, tokenizer, coordinates, ragged_requests, teacher_forced):
    model = make_model(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        completion = attached(model, tokenizer).generate(ragged_requests[:2], SAMPLING, coordinates)[0]
    expected = teacher_forced(model, ragged_requests[0].token_ids, completion.token_ids)
    assert completion.sampler_logprobs == pytest.approx(expected.tolist(), abs=0.1)


class Casts(TorchDispatchMode):
    """Counts the tensors of each shape that are cast to bf16."""

    def __init__(self):
        super().__init__()
        self.by_shape = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.by_shape[tuple(args[0].shape)] += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("share_prompts_from", [None, 0])
def test_under_autocast_weights_and_keys_are_cast_once(make_model, tokenizer, coordinates, share_prompts_from):
    model = make_model(dtype=torch.float32)
    engine = attached(model, tokenizer, eos=frozenset(), share_prompts_from=share_prompts_from)
    requests = [GenerationRequest(token_ids=tuple(range(3, 23)), slot=0, num_completions=3)]
    expected = engine.generate(requests, SAMPLING, coordinates)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), Casts() as casts:
        drawn = engine.generate(requests, SAMPLING, coordinates)
    weights = Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert {shape: casts.by_shape[shape] for shape in weights} == weights
    assert {keys.dtype for keys in engine._cache._keys} == {torch.bfloat16}
    width = model.config.head_dim
    states = {
        shape: n for shape, n in casts.by_shape.items() if len(shape) == 4 and shape[2] >= 20 and shape[3] == width
    }
    assert {shape[2] for shape in states} == {20}, "the prompt's, as they are read, and none with what follows"
    assert sum(states.values()) < SAMPLING.max_new_tokens
    assert drawn != expected


@torch.no_grad()
def test_what_a_rollout_has_cast_does_not_outlive_it(make_model, tokenizer, coordinates):
    model = make_model(dtype=torch.float32)
    engine = attached(model, tokenizer)
    requests = [GenerationRequest(token_ids=(3, 4), slot=0, num_completions=2)]
    input_ids = torch.tensor([[3, 4]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.generate(requests, SAMPLING, coordinates)
        for parameter in model.parameters():
            parameter.mul_(2)
        logits = model(input_ids=input_ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(input_ids=input_ids).logits, logits)


def test_a_rollout_has_no_use_for_what_was_cast_before_it(make_model, tokenizer, coordinates, ragged_requests):
    model = make_model(dtype=torch.float32)
    engine = attached(model, tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.tensor([[3, 4]]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        drawn = engine.generate(ragged_requests, SAMPLING, coordinates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine.generate(ragged_requests, SAMPLING, coordinates) == drawn


@pytest.mark.parametrize("share_prompts_from", [None, 0])
def test_autocast_leaves_double_precision_alone(
    make_model, tokenizer, coordinates, ragged_requests, share_prompts_from
):
    model = make_model(dtype=torch.float64)
    engine = attached(model, tokenizer, share_prompts_from=share_prompts_from)
    expected = engine.generate(ragged_requests, SAMPLING, coordinates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokens(engine.generate(ragged_requests, SAMPLING, coordinates)) == tokens(expected)


def test_another_attention_of_the_policy_is_put_aside_for_decoding(make_model, tokenizer, coordinates, ragged_requests):
    model = make_model()
    engine = attached(model, tokenizer)
    expected = engine.generate(ragged_requests, SAMPLING, coordinates)
    model.set_attn_implementation("flex_attention")
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == expected
    assert model.config._attn_implementation == "flex_attention"
    model.set_attn_implementation("eager")
    assert tokens(engine.generate(ragged_requests, SAMPLING, coordinates)) == tokens(expected)


def test_memory_is_kept_between_calls_and_given_back_by_close(make_model, tokenizer, coordinates, ragged_requests):
    engine = attached(make_model(), tokenizer)
    first = engine.generate(ragged_requests, SAMPLING, coordinates)
    memory = engine._cache._storage[0].data_ptr()
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == first
    assert engine._cache._storage[0].data_ptr() == memory
    engine.close()
    assert not engine._cache._storage


def test_what_was_generated_before_changes_no_bit(make_model, tokenizer, coordinates, ragged_requests):
    model = make_model(dtype=torch.float32)
    fresh = attached(model, tokenizer).generate(ragged_requests, SAMPLING, coordinates)
    engine = attached(model, tokenizer)
    long = GenerationRequest(slot=0, token_ids=(5,) * 40, num_completions=30)
    engine.generate([long], replace(SAMPLING, max_new_tokens=110), coordinates)
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == fresh


def test_an_engine_can_be_attached_to_another_policy(make_model, tokenizer, coordinates, ragged_requests):
    engine = attached(make_model("llama", torch.float32), tokenizer)
    engine.generate(ragged_requests, SAMPLING, coordinates)
    other = make_model("qwen2")
    engine.setup(other, tokenizer, EOS)
    expected = attached(other, tokenizer).generate(ragged_requests, SAMPLING, coordinates)
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == expected


def test_a_prompt_beyond_the_models_positions_is_refused_before_decoding(make_model, tokenizer, coordinates):
    model = make_model()
    shapes = fed(model)
    engine = attached(model, tokenizer)
    request = GenerationRequest(slot=0, token_ids=(5,) * 100, num_completions=2)
    with pytest.raises(ConfigurationError, match=r"model\.sampling\.max_new_tokens: a prompt of 100 tokens and 61 new"):
        engine.generate([request], replace(SAMPLING, max_new_tokens=61), coordinates)
    assert not shapes
    assert len(engine.generate([request], replace(SAMPLING, max_new_tokens=60), coordinates)) == 2


def test_an_empty_prompt_is_refused(make_model, tokenizer, coordinates):
    with pytest.raises(ConfigurationError, match="a prompt has no tokens"):
        attached(make_model(), tokenizer).generate(
            [GenerationRequest(slot=0, token_ids=(), num_completions=1)], SAMPLING, coordinates
        )


@pytest.mark.parametrize("max_rows", [0, -3])
def test_fewer_than_one_row_is_refused(max_rows):
    with pytest.raises(ConfigurationError, match=rf"model\.engine\.max_rows must be >= 1 or null, got {max_rows}"):
        InProcessEngine(max_rows=max_rows)


def test_only_two_ways_of_gathering_are_known():
    with pytest.raises(ConfigurationError, match=r"model\.engine\.gather must be one of .*'layerwise'.*, got 'half'"):
        InProcessEngine(gather="half")


def test_diverged_weights_are_reported_and_leave_no_trace(make_model, tokenizer, coordinates, ragged_requests):
    model = make_model()
    engine, short = attached(model, tokenizer, max_rows=4), replace(SAMPLING, max_new_tokens=2)
    expected = engine.generate(ragged_requests, short, coordinates)
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    kept = weight.clone()
    weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        # Long prompts fill columns that the short ones of the other calls hide without ever writing them.
        engine.generate([replace(ragged_requests[1], num_completions=4)], SAMPLING, coordinates)
    weight.copy_(kept)
    assert engine.generate(ragged_requests, short, coordinates) == expected


def test_a_stop_string_at_the_limit_is_a_stop(make_model, tokenizer, coordinates, ragged_requests):
    engine = attached(make_model(), tokenizer)
    free = next(c for c in engine.generate(ragged_requests[:1], SAMPLING, coordinates) if len(c.text) > 5)
    sampling = replace(SAMPLING, stop=(free.text[2:5],), max_new_tokens=free.text.index(free.text[2:5]) + 3)
    stopped = engine.generate(ragged_requests[:1], sampling, coordinates)
    assert FinishReason.STOP in {c.finish_reason for c in stopped}
