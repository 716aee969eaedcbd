import doctest
from types import SimpleNamespace

import pytest
from mutants import Mutant, wrong_sign

from grpo_lightning.callbacks import soft_overlong
from grpo_lightning.callbacks.soft_overlong import SoftOverlong
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, SamplingParams


@pytest.mark.parametrize(
    ("length", "penalty"),
    # DAPO's own setting: L = 20480, C = 4096, so that L - C = 16384.
    [
        (0, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (18432, -0.5),  # (16384 - 18432) / 4096 = -2048 / 4096
        (20479, -4095 / 4096),
        (20480, -1.0),
        (20481, -1.0),
        (10**6, -1.0),
    ],
)
def test_equation_13_by_hand(length, penalty):
    assert SoftOverlong(max_length=20480, cache_length=4096).penalty(length) == penalty


def test_it_equals_the_clipped_form_of_scalerl(prove):
    def error():
        errors = []
        for limit, cache in ((20_480, 4_096), (14_000, 2_000)):
            reward = SoftOverlong(max_length=limit, cache_length=cache)
            middle = limit - cache // 2
            anchors = {0: 0.0, limit - cache: 0.0, middle: -0.5, limit: -1.0, limit + 1: -1.0, 10 * limit: -1.0}
            errors += [abs(reward.penalty(length) - penalty) for length, penalty in anchors.items()]
            for length in range(0, limit + 2_000, 7):
                clipped = min(0.0, max(-1.0, (limit - length) / cache - 1))
                errors.append(abs(reward.penalty(length) - clipped))
                # Continuous: a token more never costs more than its share of the cache.
                errors.append(max(0.0, reward.penalty(length) - reward.penalty(length + 1) - 1 / cache))
        return max(errors)

    target = "callbacks.soft_overlong.SoftOverlong.penalty"
    prove(
        "0 up to L - C, -1/2 in the middle, -1 at L and beyond, continuous: ScaleRL's clipped form",
        "DAPO, equation 13; ScaleRL (arXiv 2510.13786), equation 9",
        error,
        wrong_sign(target),
        Mutant(
            "no end of the slope",
            target,
            lambda f: lambda self, n: min(0.0, (self.max_length - n) / self.cache_length - 1),
        ),
        Mutant("begins at L", target, lambda f: lambda self, n: f(self, n - self.cache_length)),
        tolerance=1e-12,  # other roundings of the same quotient
    )


def test_every_token_of_the_completion_counts():
    completion = Completion(token_ids=(1,) * 9, sampler_logprobs=(0.0,) * 9, text="", finish_reason=FinishReason.LENGTH)
    assert SoftOverlong(max_length=10, cache_length=4).score([], [completion]) == [-0.75]


@pytest.mark.parametrize("cache_length", [0, -1, 11])
def test_a_cache_longer_than_the_limit_is_a_configuration_error(cache_length):
    with pytest.raises(ConfigurationError, match=r"SoftOverlong\.cache_length"):
        SoftOverlong(max_length=10, cache_length=cache_length)


@pytest.mark.parametrize(("max_new_tokens", "has_effect"), [(6, False), (7, True), (10, True)])
def test_a_penalty_that_no_completion_can_reach_is_said(max_new_tokens, has_effect, caplog):
    module = SimpleNamespace(sampling=SamplingParams(max_new_tokens=max_new_tokens))
    SoftOverlong(max_length=10, cache_length=4).setup(None, module, "fit")
    assert ("has no effect" not in caplog.text) is has_effect


def test_the_example_of_the_docstring_holds():
    outcome = doctest.testmod(soft_overlong)
    assert (outcome.failed, outcome.attempted) == (0, 1)
