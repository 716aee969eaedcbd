"""The contract of `RolloutEngine`, to which every engine that can run here is held."""

import math
from dataclasses import replace

import pytest
import torch
from mutants import Mutant

from grpo_lightning.policy import NamedWeights
from grpo_lightning.types import Coordinates, FinishReason, GenerationRequest, SamplingParams, Stream

EOS = frozenset({1})
SAMPLING = SamplingParams(max_new_tokens=24)


@pytest.fixture
def model(make_model, engine_case):
    return make_model(dtype=engine_case.dtype, head_dim=engine_case.head_dim)


def attach(engine, model, tokenizer):
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), version=0)


@pytest.fixture
def engine(make_engine, model, tokenizer):
    engine = make_engine()
    attach(engine, model, tokenizer)
    yield engine
    engine.close()


def tokens(completions):
    return [completion.token_ids for completion in completions]


def test_every_engine_of_the_package_is_held_to_the_contract(known_engines):
    assert known_engines.found == known_engines.registered


def test_no_requests_give_no_completions(engine, coordinates):
    assert engine.generate([], SAMPLING, coordinates) == []
    assert engine.generate([GenerationRequest(slot=0, token_ids=(5,), num_completions=0)], SAMPLING, coordinates) == []


def test_completions_come_request_by_request(engine, coordinates, ragged_requests):
    requests = [replace(r, num_completions=i % 3 + 1) for i, r in enumerate(ragged_requests)]
    together = engine.generate(requests, SAMPLING, coordinates)
    assert tokens(together) == [c for r in requests for c in tokens(engine.generate([r], SAMPLING, coordinates))]
    assert len(together) == sum(r.num_completions for r in requests)


def test_the_first_samples_do_not_depend_on_the_size_of_the_group(engine, coordinates, ragged_requests):
    small = engine.generate([ragged_requests[0]], SAMPLING, coordinates)
    large = engine.generate([replace(ragged_requests[0], num_completions=9)], SAMPLING, coordinates)
    assert tokens(large)[:3] == tokens(small)


def test_a_completion_is_well_formed(engine, coordinates, ragged_requests, tokenizer):
    for completion in engine.generate(ragged_requests, SAMPLING, coordinates):
        assert len(completion.token_ids) == len(completion.sampler_logprobs) <= SAMPLING.max_new_tokens
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert all(logprob <= 0 for logprob in completion.sampler_logprobs)
        assert not EOS.intersection(completion.token_ids[:-1])
        ended = completion.token_ids[-1] in EOS
        assert completion.finish_reason is (FinishReason.EOS if ended else FinishReason.LENGTH)
        assert ended or len(completion.token_ids) == SAMPLING.max_new_tokens


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_equal_a_teacher_forced_forward(engine_case, make_model, tokenizer, coordinates, ragged_requests,
                                                 teacher_forced, family, temperature):  # fmt: skip
    if family in engine_case.not_tried:
        pytest.skip("not tried with this engine")
    model = make_model(family, torch.float32, head_dim=engine_case.head_dim)
    engine = engine_case.make()
    attach(engine, model, tokenizer)
    completions = engine.generate(ragged_requests, replace(SAMPLING, temperature=temperature), coordinates)
    engine.close()
    prompts = [r.token_ids for r in ragged_requests for _ in range(r.num_completions)]
    errors_N = torch.cat([
        torch.tensor(completion.sampler_logprobs) - teacher_forced(model, prompt, completion.token_ids, temperature)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]).abs()  # fmt: skip
    assert errors_N.mean() < 1e-5
    assert errors_N.max() < 2 * max(1e-5, engine_case.tolerance)  # of logits above 10, divided by the temperature


def assert_same(completions, expected, tolerance):
    """The same completions, whose log-probs may differ by what another order of summation does."""
    for completion, other in zip(completions, expected, strict=True):
        assert completion.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=tolerance)
        assert replace(completion, sampler_logprobs=other.sampler_logprobs) == other


def test_the_same_coordinates_give_the_same_tokens(engine, engine_case, coordinates, ragged_requests):
    first = engine.generate(ragged_requests, SAMPLING, coordinates)
    engine.generate(ragged_requests[:2], SAMPLING, replace(coordinates, stream=Stream.VALIDATION))
    assert_same(engine.generate(ragged_requests, SAMPLING, coordinates), first, engine_case.tolerance)


@pytest.mark.parametrize("change", [{"seed": 12}, {"stream": Stream.VALIDATION}, {"iteration": 4}])
def test_other_coordinates_give_other_tokens(engine, coordinates, ragged_requests, change):
    first = tokens(engine.generate(ragged_requests, SAMPLING, coordinates))
    other = tokens(engine.generate(ragged_requests, SAMPLING, replace(coordinates, **change)))
    assert not set(first) & set(other)


def test_a_prompt_in_two_slots_gets_two_groups_and_its_samples_differ(engine, coordinates, ragged_requests):
    # Requests 1 and 5 have the same prompt.
    drawn = tokens(engine.generate([ragged_requests[1], ragged_requests[5]], SAMPLING, coordinates))
    assert len(set(drawn)) == 6


def test_tokens_do_not_depend_on_the_batch(engine, coordinates, ragged_requests):
    together = dict(zip([(r.slot, i) for r in ragged_requests for i in range(3)],
                        tokens(engine.generate(ragged_requests, SAMPLING, coordinates)), strict=True))  # fmt: skip
    shuffled = [ragged_requests[i] for i in (3, 5, 0, 4, 2, 1)]
    drawn = tokens(engine.generate(shuffled, SAMPLING, coordinates))
    assert drawn == [together[r.slot, i] for r in shuffled for i in range(3)]


def test_two_ranks_draw_what_one_draws(make_engine, model, tokenizer, coordinates, ragged_requests):
    one, two = make_engine(), make_engine()
    for engine in (one, two):
        attach(engine, model, tokenizer)
    whole = tokens(one.generate(ragged_requests, SAMPLING, coordinates))
    shares = [tokens(engine.generate(ragged_requests[rank::2], SAMPLING, coordinates))
              for rank, engine in enumerate((one, two))]  # fmt: skip
    assert [whole[3 * i : 3 * i + 3] for i in range(6)] == [
        shares[i % 2][3 * (i // 2) : 3 * (i // 2) + 3] for i in range(6)
    ]


def test_an_end_of_sequence_at_the_limit_is_no_truncation(engine, engine_case, coordinates, ragged_requests):
    ended = next(
        (r.slot, i, c)
        for r in ragged_requests
        for i, c in enumerate(engine.generate([r], replace(SAMPLING, max_new_tokens=90), coordinates))
        if c.finish_reason is FinishReason.EOS and len(c.token_ids) > 2
    )
    slot, index, completion = ended
    request = next(r for r in ragged_requests if r.slot == slot)
    exact, shorter = (
        engine.generate([request], replace(SAMPLING, max_new_tokens=len(completion.token_ids) - cut), coordinates)[
            index
        ]
        for cut in (0, 1)
    )
    assert_same([exact], [completion], engine_case.tolerance)
    assert not exact.is_truncated
    assert shorter.token_ids == completion.token_ids[:-1]
    assert shorter.is_truncated


def test_a_single_new_token_is_drawn(engine, coordinates, ragged_requests):
    completions = engine.generate(ragged_requests, replace(SAMPLING, max_new_tokens=1), coordinates)
    longer = engine.generate(ragged_requests, SAMPLING, coordinates)
    assert tokens(completions) == [ids[:1] for ids in tokens(longer)]


def test_no_end_of_sequence_before_the_minimum(engine, coordinates, ragged_requests, model):
    sampling = replace(SAMPLING, temperature=2.0, min_new_tokens=10, max_new_tokens=60)
    free = engine.generate(ragged_requests, replace(sampling, min_new_tokens=0), coordinates)
    held = engine.generate(ragged_requests, sampling, coordinates)
    assert min(map(len, tokens(free))) <= 10 < min(map(len, tokens(held)))
    assert any(c.finish_reason is FinishReason.EOS for c in held)


def test_a_suppressed_end_of_sequence_leaves_a_distribution(engine, engine_case, coordinates, ragged_requests, model):
    sampling = replace(SAMPLING, temperature=2.0, min_new_tokens=1, max_new_tokens=1)
    request = ragged_requests[0]
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([request.token_ids])).logits[0, -1] / 2.0
    logits_V[1] = -math.inf
    for completion in engine.generate([request], sampling, coordinates):
        expected = logits_V.log_softmax(0)[completion.token_ids[0]].item()
        assert completion.sampler_logprobs[0] == pytest.approx(expected, abs=engine_case.tolerance)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine, coordinates, ragged_requests,
                                                                          tokenizer):  # fmt: skip
    def text(completion):
        """Special tokens count with their text."""
        return tokenizer.decode(completion.token_ids)

    sampling = replace(SAMPLING, temperature=2.0, max_new_tokens=60)
    free = engine.generate(ragged_requests, sampling, coordinates)
    long = [text(completion) for completion in free if len(completion.text) > 8]
    stop, others = long[0][6:8], (long[1][4:6], "not in there")
    stopped = engine.generate(ragged_requests, replace(sampling, stop=(stop, *others)), coordinates)
    for before, after in zip(free, stopped, strict=True):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        found = [text(before).find(s) + len(s) for s in (stop, *others) if s in text(before)]
        if found:
            assert len(tokenizer.decode(after.token_ids[:-1])) < min(found) <= len(text(after))
            assert after.finish_reason is FinishReason.STOP
        else:
            assert (after.token_ids, after.finish_reason) == (before.token_ids, before.finish_reason)
    assert {c.finish_reason for c in stopped} > {FinishReason.STOP}


def test_greedy_takes_the_likeliest_token_and_reports_it_at_temperature_one(engine, coordinates, ragged_requests, model,
                                                                            teacher_forced):  # fmt: skip
    completions = engine.generate(ragged_requests, replace(SAMPLING, temperature=0.0, max_new_tokens=8), coordinates)
    for i, completion in enumerate(completions):
        prompt = ragged_requests[i // 3].token_ids
        assert completion.token_ids == completions[i - i % 3].token_ids
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
        assert tuple(logits_LV[len(prompt) - 1 : -1].argmax(-1).tolist()) == completion.token_ids
        expected = teacher_forced(model, prompt, completion.token_ids).tolist()
        assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-5)


def test_top_k_and_top_p_draw_from_the_support_and_renormalise(engine, coordinates, ragged_requests, model):
    completions = engine.generate(ragged_requests, replace(SAMPLING, top_k=3, top_p=0.8), coordinates)
    for i, completion in enumerate(completions):
        prompt = ragged_requests[i // 3].token_ids
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 :]
        for logits_V, token, logprob in zip(logits_LV, completion.token_ids, completion.sampler_logprobs, strict=False):
            values, order = logits_V.topk(3)
            probabilities = values.softmax(0)
            count = 1 + int((probabilities.cumsum(0)[:-1] < 0.8).sum())
            kept = dict(zip(order[:count].tolist(), values[:count].log_softmax(0).tolist(), strict=True))
            assert logprob == pytest.approx(kept[token], abs=1e-5)


def test_new_weights_change_the_completions_and_their_version(engine, coordinates, ragged_requests, model,
                                                              teacher_forced):  # fmt: skip
    before = engine.generate(ragged_requests, SAMPLING, coordinates)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.update_weights(NamedWeights(model), version=7)
    after = engine.generate(ragged_requests, SAMPLING, coordinates)
    assert tokens(after) != tokens(before)
    assert {c.weight_version for c in before} == {0}
    assert {c.weight_version for c in after} == {7}
    expected = teacher_forced(model, ragged_requests[0].token_ids, after[0].token_ids)
    assert after[0].sampler_logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_first_and_second_tokens_follow_the_models_distribution(engine, engine_case, model, ragged_requests):
    sampling = SamplingParams(temperature=0.8, max_new_tokens=2, min_new_tokens=2)
    prompt = ragged_requests[0].token_ids
    request = GenerationRequest(slot=0, token_ids=prompt, num_completions=engine_case.num_draws)
    drawn = engine.generate([request], sampling, Coordinates(seed=0, stream=Stream.TRAINING, iteration=0))
    pairs_RT = torch.tensor(tokens(drawn))

    def distribution(input_ids):
        with torch.no_grad():
            logits = model(input_ids=input_ids).logits[:, -1]
        logits[:, 1] = -math.inf
        return (logits / 0.8).softmax(-1)

    first_V = distribution(torch.tensor([prompt]))[0]
    second_VV = distribution(torch.cat((torch.tensor([prompt]).expand(62, -1), torch.arange(62)[:, None]), dim=1))
    for column, probabilities_V in enumerate((first_V, first_V @ second_VV)):
        assert unlikeliness(probabilities_V, pairs_RT[:, column]) < 4  # the draws are fixed, so this cannot flicker


@pytest.mark.parametrize(
    ("settings", "defects"),
    [
        ({"temperature": 0.6}, [{"temperature": 1.0}, {"temperature": 0.65}]),
        ({"top_k": 7}, [{"top_k": 8}, {"top_k": 6}]),
        ({"top_p": 0.6}, [{"top_p": 0.7}, {"top_p": 0.5}]),
        ({"temperature": 1.5, "top_k": 20, "top_p": 0.8}, [{"temperature": 1.0}, {"top_k": 62}, {"top_p": 1.0}]),
    ],
    ids=["temperature", "top_k", "top_p", "together"],
)
def test_first_tokens_follow_the_distribution_that_the_settings_leave(
    engine, engine_case, model, ragged_requests, settings, defects, prove
):
    prompt = ragged_requests[3].token_ids
    request = GenerationRequest(slot=0, token_ids=prompt, num_completions=engine_case.num_draws)
    coordinates = Coordinates(seed=0, stream=Stream.VALIDATION, iteration=0)
    sampling = SamplingParams(max_new_tokens=1, **settings)
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([prompt])).logits[0, -1] / settings.get("temperature", 1.0)
    # The likeliest first: the k first, then as many of them as it takes to reach p.
    order_V = logits_V.argsort(descending=True)[: settings.get("top_k")]
    reached_V = logits_V[order_V].softmax(0).cumsum(0)
    kept_V = order_V[: 1 + int((reached_V < settings.get("top_p", 1.0)).sum())]
    probabilities_V = torch.zeros_like(logits_V).scatter(0, kept_V, logits_V[kept_V].softmax(0))
    assert 3 <= len(kept_V) <= 62

    def error():
        drawn = engine.generate([request], sampling, coordinates)
        return unlikeliness(probabilities_V, torch.tensor([ids[0] for ids in tokens(drawn)]))

    def instead(defect):
        return Mutant(
            ", ".join(f"{name} {value}" for name, value in defect.items()),
            "rollout.sampling.sampling_logits",
            lambda f: lambda logits_RV, sampling: f(logits_RV, replace(sampling, **defect)),
        )

    if not engine_case.draws_itself:
        assert error() < 4
    else:
        prove(
            f"50,000 first tokens follow the distribution of {settings}: -log10 of the chi-square test's p",
            "the contract of rollout engines",
            error,
            *map(instead, defects),
            tolerance=4.0,  # the draws are fixed, so this cannot flicker
            caught_factor=2,
        )
    for completion in engine.generate([replace(request, num_completions=100)], sampling, coordinates):
        expected = probabilities_V[completion.token_ids[0]].log().item()
        assert completion.sampler_logprobs[0] == pytest.approx(expected, abs=engine_case.tolerance)


def unlikeliness(probabilities_V, tokens_R):
    """-log10 of the p of Pearson's chi-square test, over the tokens of which at least five are expected."""
    expected_V = probabilities_V * len(tokens_R)
    counts_V = tokens_R.bincount(minlength=len(probabilities_V))
    if counts_V[expected_V == 0].any():
        return math.inf
    seen_V = expected_V >= 5
    statistic = ((counts_V - expected_V)[seen_V] ** 2 / expected_V[seen_V]).sum()
    freedom = (seen_V.sum() - 1).to(statistic.dtype)
    return -torch.special.gammaincc(freedom / 2, statistic / 2).log10().item()
