import importlib.util
from pathlib import Path

import pytest
import torch

from grpo_lightning.types import Completion, FinishReason

PATH = Path(__file__).parents[2] / "tools" / "measure_token_flips.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_token_flips", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def completion(token_ids, logprobs):
    return Completion(token_ids=token_ids, sampler_logprobs=logprobs, text="", finish_reason=FinishReason.EOS)


def test_a_flip_ends_the_comparison(script):
    one = completion((5, 6, 7, 8), (-1.0, -2.0, -3.0, -4.0))
    other = completion((5, 6, 9, 8, 1), (-1.0, -2.5, -7.0, -4.0, -1.0))
    # Tokens 0 and 1 agree, 2 flips; what follows is not compared. Log-probs differ by 0 and 0.5.
    tally = script.compare(one, other)
    assert (tally.num_tokens, tally.num_flips) == (3, 1)
    assert tally.largest_difference == 0.5
    assert tally.negative_logprobs == 6.0


def test_equal_completions_have_no_flip(script):
    one = completion((5, 1), (-1.0, -2.0))
    tally = script.compare(one, one) + script.compare(one, one)
    assert (tally.num_tokens, tally.num_flips, tally.largest_difference) == (4, 0, 0.0)


@pytest.mark.parametrize(
    ("num_tokens", "num_flips", "rate"),
    # Of 100 flips the standard error is 10; of none in n tokens, the probability is below 5 % from a rate of 3 / n on.
    [(1_000_000, 100, "1.0e-04 ± 1e-05"), (300_000, 0, "< 1e-05 (95 %)")],
)
def test_a_rate_has_its_uncertainty(script, num_tokens, num_flips, rate):
    assert script.Tally(num_tokens=num_tokens, num_flips=num_flips).rate == rate


def test_it_prints_the_conditions_and_finds_no_flip_in_double_precision(script, capsys):
    script.main(
        ["--num-tokens", "100", "--num-prompts", "1", "--weight-std", "0.1", "--rows", "8", "3", "--dtype", "float64"]
    )
    printed = capsys.readouterr().out
    assert "float64, batches of at most 8 against 3 rows" in printed
    name, entropy, tokens, flips, difference, *_ = printed.splitlines()[-1].split()
    assert name == "all"
    assert 0 < float(entropy) < 5
    assert int(tokens) >= 100
    assert (flips, float(difference) < 1e-12) == ("0", True)
    assert float(difference) > 0, "the two batches must be computed differently, or nothing is compared"


def test_its_policies_are_of_the_widths_asked_for(script):
    model = script.random_policy(script.CharacterPolicy(), 0.3, torch.float32)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert model.dtype == torch.float32
