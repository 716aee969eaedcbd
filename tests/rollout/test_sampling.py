import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_lightning.rollout import sampling as sampling_module
from grpo_lightning.rollout.sampling import draw, sample, sampling_logprobs, suppress_
from grpo_lightning.types import SamplingParams

ALMOST_ONE = 1 - 2**-53
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def chi_square(counts, probabilities):
    """Pearson's statistic over the entries of which at least five are expected, and its degrees of freedom."""
    expected = probabilities.double() * counts.sum()
    seen = expected >= 5
    return ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum().item(), int(seen.sum()) - 1


def reference_draw(weights, uniform):
    """The first token whose cumulative weight exceeds the uniform number times the total, in plain Python."""
    threshold, cumulative = uniform * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        cumulative += weight
        if cumulative > threshold:
            return token
    raise AssertionError


def reference_support(logits, top_k, top_p):
    """The tokens that top-k, then top-p leave, in plain Python; no ties."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    total, kept, cumulative = sum(math.exp(logits[token]) for token in order), set(), 0.0
    for token in order:
        kept.add(token)
        cumulative += math.exp(logits[token]) / total
        if cumulative >= top_p:
            break
    return kept


@pytest.mark.parametrize(
    ("uniform", "token"),
    # Weights 1 0 2 1: cumulative .25 .25 .75 1.
    [(0.0, 0), (0.24, 0), (0.25, 2), (0.26, 2), (0.74, 2), (0.75, 3), (0.99, 3), (ALMOST_ONE, 3)],
)
def test_a_draw_inverts_the_cumulative_distribution(uniform, token):
    weights_RV = torch.tensor([[1.0, 0.0, 2.0, 1.0]])
    assert draw(weights_RV, torch.tensor([uniform], dtype=torch.float64))[0].tolist() == [token]


@pytest.mark.parametrize("vocabulary", [7, 62, 256, 257, 1000, 5003])
@pytest.mark.parametrize("uniform", [0.0, 2**-60, 0.5, ALMOST_ONE])
def test_a_token_without_probability_is_never_drawn(vocabulary, uniform):
    generator = torch.Generator().manual_seed(vocabulary)
    weights_RV = torch.rand(64, vocabulary, generator=generator)
    weights_RV[torch.rand(64, vocabulary, generator=generator) < 0.9] = 0
    weights_RV[:, : vocabulary // 3] = 0
    weights_RV[:, -vocabulary // 3 :] = 0
    weights_RV[:, vocabulary // 2] = 1e-30
    tokens_R, _ = draw(weights_RV, torch.full((64,), uniform, dtype=torch.float64))
    assert (weights_RV.gather(1, tokens_R[:, None]) > 0).all()


def test_a_number_that_rounding_brought_to_one_draws_the_last_possible_token():
    weights_RV = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    assert draw(weights_RV, torch.ones(1, dtype=torch.float64))[0].tolist() == [2]


def test_sums_that_are_not_quite_monotone_draw_no_impossible_token(monkeypatch):
    # The products that stand in for cumulative sums on CUDA may round neighbouring sums differently.
    noise_V = torch.tensor([0, 1e-12, -1e-12, 0, 2e-12], dtype=torch.float64)
    monkeypatch.setattr(sampling_module, "_prefix_sums", lambda values: values.cumsum(dim=-1) + noise_V)
    weights_RV = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]])
    for uniform, token in [(0.5 + 2e-13, 3), (0.5 - 1e-9, 0), (ALMOST_ONE, 3)]:
        assert draw(weights_RV, torch.tensor([uniform], dtype=torch.float64))[0].tolist() == [token]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("vocabulary", [3, 62, 256, 257, 1000])
def test_one_and_two_levels_agree_with_a_scan(vocabulary, device):
    weights_RV = torch.rand(300, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    uniforms_R = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [reference_draw(w, u) for w, u in zip(weights_RV.tolist(), uniforms_R.tolist(), strict=True)]
    tokens_R, totals_R = draw(weights_RV.to(device), uniforms_R.to(device))
    assert tokens_R.tolist() == expected
    torch.testing.assert_close(totals_R.cpu(), weights_RV.sum(dim=1))


@pytest.mark.parametrize("vocabulary", [62, 2000])
def test_draws_follow_the_distribution(vocabulary):
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    uniforms_R = torch.rand(50_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampling = SamplingParams(temperature=0.7)
    tokens_R = torch.cat([sample(logits_V.expand(len(u), -1), u, sampling).tokens_R for u in uniforms_R.split(5000)])
    statistic, freedom = chi_square(tokens_R.bincount(minlength=vocabulary), (logits_V / 0.7).softmax(0))
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_log_probabilities_are_those_at_the_temperature():
    # exp(logits / 2) is 1, 2, 4 of 7.
    logits_RV = 2 * torch.tensor([[1.0, 2.0, 4.0]]).log()
    drawn = sample(logits_RV, torch.tensor([0.2], dtype=torch.float64), SamplingParams(temperature=2.0))
    assert drawn.tokens_R.tolist() == [1]
    torch.testing.assert_close(drawn.logprobs_R, torch.tensor([2 / 7]).log())


def test_greedy_takes_the_first_of_the_likeliest_and_reports_temperature_one():
    # exp(logits) is 1, 3, 3 of 7.
    logits_RV = torch.tensor([[1.0, 3.0, 3.0]]).log()
    drawn = sample(logits_RV, torch.tensor([0.9], dtype=torch.float64), SamplingParams(temperature=0.0))
    assert drawn.tokens_R.tolist() == [1]
    torch.testing.assert_close(drawn.logprobs_R, torch.tensor([3 / 7]).log())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2]), (0.01, [0]), (0.0, [0]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    # Equal tokens count in their order, so that 0.76 needs only the first of the two eighths.
    logits_RV = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    logprobs_RV = sampling_logprobs(logits_RV, SamplingParams(top_p=top_p))
    assert logprobs_RV.isfinite().nonzero()[:, 1].tolist() == kept
    torch.testing.assert_close(logprobs_RV.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_top_k_keeps_all_that_tie_with_the_kth():
    logprobs_RV = sampling_logprobs(torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]]), SamplingParams(top_k=2))
    assert logprobs_RV.isfinite().tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 10_000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("vocabulary", [30, 700])
def test_top_k_and_top_p_agree_with_a_slow_reference(top_k, top_p, vocabulary):
    generator = random.Random(vocabulary)
    logits = [[generator.gauss(0, 3) for _ in range(vocabulary)] for _ in range(6)]
    sampling = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p)
    logprobs_RV = sampling_logprobs(torch.tensor(logits, dtype=torch.float64), sampling)
    for row, logprobs_V in zip(logits, logprobs_RV, strict=True):
        scaled = [logit / 0.8 for logit in row]
        support = reference_support(scaled, top_k, top_p)
        assert set(logprobs_V.isfinite().nonzero().flatten().tolist()) == support
        total = math.log(sum(math.exp(scaled[token]) for token in support))
        for token in support:
            assert logprobs_V[token].item() == pytest.approx(scaled[token] - total, abs=1e-12)


def test_suppressed_tokens_have_no_probability():
    logits_RV = torch.zeros(2, 4)
    suppress_(logits_RV, torch.tensor([1, 3]), torch.tensor([True, False]))
    assert sampling_logprobs(logits_RV, SamplingParams()).exp().tolist() == [[0.5, 0, 0.5, 0], [0.25] * 4]


def test_a_model_without_an_end_of_sequence_has_nothing_to_suppress():
    logits_RV = torch.zeros(2, 4)
    suppress_(logits_RV, torch.empty(0, dtype=torch.long), torch.tensor([True, True]))
    assert not logits_RV.any()


@pytest.mark.parametrize(
    ("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_precision_is_at_least_single(given, computed):
    drawn = sample(torch.zeros(1, 3, dtype=given), torch.zeros(1, dtype=torch.float64), SamplingParams())
    assert drawn.logprobs_R.dtype == computed


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.3, top_k=9, top_p=0.8),
]


def logits_and_uniforms(num_rows, vocabulary, dtype=torch.float32):
    logits_RV = 3 * torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniforms_R = torch.rand(num_rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return logits_RV.to(dtype), uniforms_R


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [62, 700, 5003])
def test_a_rows_draw_does_not_depend_on_those_taken_with_it(vocabulary, dtype, sampling, monkeypatch):
    logits_RV, uniforms_R = logits_and_uniforms(23, vocabulary, dtype)
    given_RV = logits_RV.clone()
    together = sample(logits_RV, uniforms_R, sampling)
    for entries in (1, 5 * vocabulary, 23 * vocabulary - 1):
        monkeypatch.setattr(sampling_module, "_ENTRIES_AT_ONCE", entries)
        apart = sample(logits_RV, uniforms_R, sampling)
        assert torch.equal(apart.tokens_R, together.tokens_R)
        # A vector of doubles and a single one may have logarithms that differ in their last bit.
        torch.testing.assert_close(
            apart.logprobs_R, together.logprobs_R, rtol=1e-15 if dtype == torch.float64 else 0, atol=0
        )
    assert torch.equal(logits_RV, given_RV)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, views not counted."""

    def __init__(self):
        super().__init__()
        self.num_entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
            self.num_entries = max(self.num_entries, *(tensor.numel() for tensor in tensors), 0)
        return out


@pytest.mark.parametrize("sampling", SETTINGS)
def test_nothing_of_all_rows_and_the_whole_vocabulary_is_made(sampling, monkeypatch):
    monkeypatch.setattr(sampling_module, "_ENTRIES_AT_ONCE", 3 * 2000)
    logits_RV, uniforms_R = logits_and_uniforms(40, 2000)
    with Largest() as largest:
        suppress_(logits_RV, torch.tensor([1, 7]), torch.ones(40, dtype=torch.bool))
    # Writing returns the logits themselves.
    assert largest.num_entries == logits_RV.numel()
    with Largest() as largest:
        sample(logits_RV, uniforms_R, sampling)
    # Where top-p cuts, its blocks pad the vocabulary to 45 * 45.
    assert largest.num_entries <= 3 * 45 * 45


@pytest.mark.parametrize("sampling", SETTINGS[:3])
def test_log_probabilities_over_a_large_vocabulary_are_exact_to_single_precision(sampling):
    logits_RV, uniforms_R = logits_and_uniforms(4, 151_936)
    drawn = sample(logits_RV, uniforms_R, sampling)
    expected_RV = (logits_RV.double() / (sampling.temperature or 1)).log_softmax(dim=1)
    # Of log-probs down to -40 the last bit is 4e-6; a sum of 150,000 weights one by one would be wrong by 3e-5.
    exact = {"rtol": 0, "atol": 5e-6}
    chosen_R = expected_RV.gather(1, drawn.tokens_R[:, None]).squeeze(1)
    torch.testing.assert_close(drawn.logprobs_R.double(), chosen_R, **exact)
    torch.testing.assert_close(sampling_logprobs(logits_RV, sampling).double(), expected_RV, **exact)


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("vocabulary", [62, 700])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 33, 61])
def test_logits_that_are_not_finite_give_nan_to_their_row_alone(column, value, vocabulary, sampling):
    logits_RV, uniforms_R = logits_and_uniforms(8, vocabulary)
    logits_RV[3, column] = value
    logits_RV[5] = -math.inf
    drawn = sample(logits_RV, uniforms_R, sampling)
    assert drawn.logprobs_R.isnan().nonzero().flatten().tolist() == [3, 5]
    assert ((drawn.tokens_R >= 0) & (drawn.tokens_R < vocabulary)).all()
