"""The coefficients follow what the updates measure, and resume with them."""

from types import SimpleNamespace

import pytest
import replay
import torch

from grpo_lightning.callbacks.adaptive_entropy import AdaptiveEntropy
from grpo_lightning.callbacks.adaptive_kl import AdaptiveKL
from grpo_lightning.objective import (
    K3,
    Clipped,
    EntropyBonus,
    GroupMean,
    KLInLoss,
    Objective,
    SequenceMeanTokenMean,
    TokenRatio,
)
from grpo_lightning.types import Coefficients, ConfigurationError

# What a product or a sum of a few doubles is rounded by.
ROUNDING = 1e-12


def objective(**parts):
    return Objective(
        advantage=GroupMean(),
        scale=None,
        ratio=TokenRatio(),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        aggregation=SequenceMeanTokenMean(),
        **parts,
    )


BOTH = objective(kl=KLInLoss(coefficient=0.05, estimator=K3()), entropy=EntropyBonus(coefficient=0.0))


def coefficients_after(controller, name, values, start):
    module = SimpleNamespace(coefficients=start)
    found = []
    for value in values:
        controller.on_update_end(None, module, {} if value is None else {name: value})
        found.append(module.coefficients)
    return found


def test_the_kl_coefficient_follows_the_error():
    # D* = 0.1: 0.11 is 10% above, 0.05 and 1.0 are beyond the clip of 20%, an update without tokens says nothing.
    controller = AdaptiveKL(target=0.1, gain=0.5, clip=0.2)
    found = coefficients_after(controller, "policy/kl", [0.11, 0.05, 1.0, None, 0.1], Coefficients(kl=2.0, entropy=0.3))
    expected = [2.0 * 1.05, 2.1 * 0.9, 1.89 * 1.1, 2.079, 2.079]
    assert [c.kl for c in found] == pytest.approx(expected, rel=ROUNDING)
    assert {c.entropy for c in found} == {0.3}


def test_the_entropy_bonus_is_paid_while_the_entropy_is_low():
    # H* = 0.2, step 0.1, at most 0.25. c: 0.1 0.2 0.25 | 0.15 0.05 0 0 | 0.1.
    # Paid only where H <= H*, the target itself too.
    controller = AdaptiveEntropy(target=0.2, step=0.1, maximum=0.25)
    entropies = [0.1, 0.2, 0.1, None, 0.3, 0.3, 0.3, 0.3, 0.1]
    found = coefficients_after(controller, "policy/entropy", entropies, Coefficients(kl=2.0, entropy=0.0))
    expected = [0.1, 0.2, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0, 0.1]
    assert [c.entropy for c in found] == pytest.approx(expected, abs=ROUNDING)
    assert {c.kl for c in found} == {2.0}


def test_what_is_not_paid_is_not_forgotten():
    controller = AdaptiveEntropy(target=0.2, step=0.1)
    found = coefficients_after(controller, "policy/entropy", [0.3, 0.1], Coefficients(kl=0.0, entropy=0.5))
    assert [c.entropy for c in found] == pytest.approx([0.0, 0.5], abs=ROUNDING)


def run(ckpt_path=None, callbacks=(), **settings):
    # The entropy of the tiny policy starts at 2.7 nats and falls: both sides of the target are seen.
    controllers = [AdaptiveKL(target=1e-4, gain=1.0), AdaptiveEntropy(target=2.6, step=0.01)]
    module, data, trainer, record = replay.make(callbacks=[*controllers, *callbacks], objective=BOTH, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, record


def test_the_next_update_is_weighted_by_what_the_last_one_measured():
    _, record = run(iterations=3, num_epochs=2)
    strengths = [metrics["policy/kl_coefficient"] for metrics in record.metrics]
    errors = [min(max(metrics["policy/kl"] / 1e-4 - 1, -0.2), 0.2) for metrics in record.metrics]
    assert strengths[0] == pytest.approx(0.05)
    for before, error, after in zip(strengths, errors, strengths[1:], strict=False):
        assert after == pytest.approx(before * (1 + error), rel=1e-5)  # logged in fp32


@pytest.mark.parametrize("micro_batch", [4 * 3, 4 * 3 + 2, 4 * 3 + 3], ids=["between", "in the middle", "in a window"])
def test_coefficients_resume_exactly(tmp_path, micro_batch):
    settings = {"iterations": 6, "num_epochs": 2, "accumulate": 2}
    module, straight = run(**settings)
    path = tmp_path / "a.ckpt"
    run(**{**settings, "iterations": 4}, callbacks=[replay.SaveAt(micro_batch, path)])
    again, resumed = run(ckpt_path=path, **settings)
    assert again.coefficients == module.coefficients
    assert again.coefficients != BOTH.coefficients
    assert len(resumed.weights) >= 4
    for i in range(1, len(resumed.weights) + 1):
        assert torch.equal(resumed.weights[-i], straight.weights[-i])
        assert resumed.metrics[-i] == straight.metrics[-i]


@pytest.mark.parametrize(
    ("controller", "parts", "key"),
    [
        (AdaptiveKL(target=0.1), {}, "model.objective.kl"),
        (AdaptiveKL(target=0.1), {"kl": KLInLoss(coefficient=0.0, estimator=K3())}, "model.objective.kl"),
        (AdaptiveEntropy(), {}, "model.objective.entropy"),
    ],
)
def test_a_run_without_the_regulariser_is_refused(controller, parts, key):
    module, data, trainer, _ = replay.make(callbacks=[controller], objective=objective(**parts))
    with pytest.raises(ConfigurationError, match=key):
        trainer.fit(module, data)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: AdaptiveKL(target=0.0), "AdaptiveKL.target must be > 0, got 0.0"),
        (lambda: AdaptiveKL(target=1.0, gain=float("nan")), "AdaptiveKL.gain must be > 0, got nan"),
        (lambda: AdaptiveKL(target=1.0, gain=2.0, clip=0.5), "AdaptiveKL.gain x AdaptiveKL.clip must be < 1"),
        (lambda: AdaptiveEntropy(target=-1.0), "AdaptiveEntropy.target must be > 0, got -1.0"),
        (lambda: AdaptiveEntropy(step=0.0), "AdaptiveEntropy.step must be > 0, got 0.0"),
        (lambda: AdaptiveEntropy(maximum=0.0), "AdaptiveEntropy.maximum must be > 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_named(make, key):
    with pytest.raises(ConfigurationError, match=key):
        make()
