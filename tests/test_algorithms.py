"""Every named algorithm through the real loop: two rewards, one of them of steps; no split changes the update."""

from dataclasses import replace
from pathlib import Path

import pytest
import replay
import torch

from grpo_lightning.objective import TopEntropyTokens

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs/algorithm").glob("*.yaml"))
# What is computed over the whole batch, of every kind: moments of completions and of tokens, penalties, columns.
OVER_THE_BATCH = ["default", "deepseekmath_process", "gdpo", "gpg", "lite_ppo", "reinforce_pp", "rloo"]
SETTINGS = {"dtype": "float64", "iterations": 2, "num_minibatches": 2, "with_steps": True, "group_size": 8}

whole = {}


def in_one_piece(name):
    if name not in whole:
        whole[name] = replay.run(objective=name, **SETTINGS)[0]
    return whole[name]


def assert_same(gradients, others):
    for mine, theirs in zip(gradients, others, strict=True):
        # The first update is of the same weights, and the weights of the others differ by rounding that Adam amplifies.
        assert float((mine - theirs).norm() / theirs.norm()) < (1e-12 if mine is gradients[0] else 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_it_moves_the_policy_and_no_micro_batch_enters(name):
    record = in_one_piece(name)
    assert all(g.isfinite().all() for g in record.gradients)
    assert any(g.norm() > 0 for g in record.gradients)
    split, _ = replay.run(objective=name, **SETTINGS, accumulate=4)
    assert_same(split.gradients, record.gradients)


@pytest.mark.parametrize("name", OVER_THE_BATCH)
def test_two_ranks(tmp_path, name):
    first, _ = replay.two_ranks(tmp_path, objective=name, **SETTINGS)
    assert_same(first["gradients"], in_one_piece(name).gradients)
    for mine, theirs in zip(first["metrics"], in_one_piece(name).metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)  # logged in fp32


def test_what_the_in_process_engine_says_of_a_token_is_what_the_trainer_says():
    """In fp64, in which no other rounding hides what is lost on the way."""
    record, _ = replay.run(objective="deepseek_v32", dtype="float64", live=True, iterations=1)
    assert 0 <= record.metrics[0]["sampler/logprob_difference"] < 1e-12


def test_a_rank_without_samples_has_the_others_statistics(tmp_path):
    settings = {"dtype": "float64", "fails_on_odd": True, "num_epochs": 2, "objective": "deepseek_v32", "iterations": 2}
    first, second = replay.two_ranks(tmp_path, **settings)
    one, _ = replay.run(**settings)
    assert first["metrics"] == second["metrics"]
    assert set(first["metrics"][0]) == set(one.metrics[0])
    assert_same(first["gradients"], one.gradients)


def test_the_most_uncertain_tokens_are_those_of_the_whole_minibatch():
    """The quantile of each micro-batch by itself would be another."""
    masked = replace(replay.overlay("default"), masks=(TopEntropyTokens(share=0.2),))
    one, _ = replay.run(objective=masked, **SETTINGS)
    split, _ = replay.run(objective=masked, **SETTINGS, accumulate=4)
    assert_same(split.gradients, one.gradients)
    assert one.metrics[0]["policy/masked"] == pytest.approx(0.8, abs=0.03)
    unmasked = in_one_piece("default")
    assert float((one.gradients[0] - unmasked.gradients[0]).norm() / unmasked.gradients[0].norm()) > 0.1


def test_coefficients_that_a_callback_moved_are_saved_and_others_are_not(tmp_path):
    class Move(replay.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.coefficients = pl_module.coefficients._replace(kl=0.5)

    path, settings = tmp_path / "run.ckpt", {"iterations": 3, "objective": "deepseekmath"}
    for callbacks, saved in (([Move(), replay.SaveAt(2, path)], {"kl": (0.04, 0.5)}), ([replay.SaveAt(2, path)], {})):
        module, data, trainer, _ = replay.make(**settings, callbacks=callbacks)
        trainer.fit(module, data)
        # The move after the second update comes after the window's end, which the checkpoint stands at.
        assert torch.load(path)["grpo_lightning"]["coefficients"] == saved
        module, data, trainer, record = replay.make(**settings)
        trainer.fit(module, data, ckpt_path=path)
        assert module.coefficients.kl == (0.5 if saved else 0.04)
        assert record.metrics[-1]["policy/kl_coefficient"] == pytest.approx(0.5 if saved else 0.04)
