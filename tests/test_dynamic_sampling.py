"""Refill in the loop: full iterations, the same on any number of ranks, resumed bit for bit, and never the end."""

import pytest
import replay
import torch
from lightning.pytorch.callbacks import Callback

from grpo_lightning.groups import DynamicSampling

SETTINGS = {"num_epochs": 2, "accumulate": 2, "iterations": 6, "max_rounds": 3, "num_solved_in_seven": 1}


class Watch(Callback):
    """What each iteration learned from, and what it drew."""

    def __init__(self):
        self.rollouts, self.rewards, self.outcomes = [], [], []

    def on_phase(self, trainer, pl_module, phase):
        if phase == "update" and pl_module.outcomes and pl_module.rollout not in self.rollouts:
            self.rollouts.append(pl_module.rollout)
            self.rewards.append(pl_module.rewards)
            self.outcomes.append(pl_module.outcomes)


def run(ckpt_path=None, callbacks=(), **settings):
    watch = Watch()
    module, data, trainer, record = replay.make(callbacks=[watch, *callbacks], **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, record, watch


def test_iterations_are_filled_up_with_groups_that_have_a_signal():
    module, _, watch = run(**SETTINGS)
    filled = 0
    for rollout, rewards, outcomes in zip(watch.rollouts, watch.rewards, watch.outcomes, strict=True):
        num_kept = sum(outcome.is_kept for outcome in outcomes)
        kept_P = DynamicSampling().keep(rewards.totals_B.view(4, 4), rewards.valid_B.view(4, 4))
        assert int(kept_P.sum()) == min(num_kept, 4)
        assert rollout.slots == (0, 1, 2, 3)
        drawn = [outcome.prompt_index for outcome in outcomes]
        assert len(drawn) in (4, 8, 12)
        assert len({*drawn}) == len(drawn)  # also where an epoch ends in the first round
        filled += len(drawn) > 4 and num_kept >= 4
    assert filled >= 2
    assert module.iteration == 6


def test_where_every_group_has_a_signal_nothing_changes():
    settings = {"num_epochs": 2, "iterations": 3, "num_minibatches": 2}
    _, plain, _ = run(**settings)
    _, refilled, watch = run(**settings, max_rounds=3)
    assert all(len(outcomes) == 4 and all(o.is_kept for o in outcomes) for outcomes in watch.outcomes)
    assert all(map(torch.equal, plain.weights, refilled.weights))
    assert plain.metrics == refilled.metrics


@pytest.mark.parametrize("micro_batch", [4 * 3, 4 * 3 + 1, 4 * 3 + 2, 4 * 3 + 3])
def test_a_refilled_run_resumes_bit_for_bit(tmp_path, micro_batch):
    path = tmp_path / "a.ckpt"
    _, straight, _ = run(**SETTINGS)
    run(**{**SETTINGS, "iterations": 4}, callbacks=[replay.SaveAt(micro_batch, path)])
    _, resumed, _ = run(ckpt_path=path, **SETTINGS)
    assert len(resumed.weights) >= 4
    for i in range(1, len(resumed.weights) + 1):
        assert torch.equal(resumed.weights[-i], straight.weights[-i])
        assert resumed.metrics[-i] == straight.metrics[-i]


@pytest.mark.parametrize("num_solved", [0, 7], ids=["hopeless", "solved"])
def test_a_run_without_any_signal_says_so_and_goes_on(num_solved, caplog):
    settings = {**SETTINGS, "num_solved_in_seven": num_solved, "iterations": 2}
    with caplog.at_level("INFO"):
        module, record, watch = run(**settings)
    assert module.iteration == 2
    assert all(len(outcomes) == 12 for outcomes in watch.outcomes)
    assert record.gradients == []
    assert all(torch.equal(weights, record.weights[0]) for weights in record.weights)
    assert "Iteration 1: after 3 rounds 0 of 4 groups have something to learn from; the run goes on" in caplog.text


def test_two_ranks_make_the_same_rounds(tmp_path):
    settings = {**SETTINGS, "dtype": "float64", "iterations": 5, "accumulate": 1}
    first, second = replay.two_ranks(tmp_path, **settings)
    _, one, _ = run(**settings)
    # fp64 sums of the same numbers in another order, which Adam amplifies where a gradient is nearly zero.
    torch.testing.assert_close(first["gradients"][0], one.gradients[0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(first["weights"][-1], one.weights[-1], rtol=1e-6, atol=1e-9)
    assert (first["slots"], second["slots"]) == ((0, 2), (1, 3))


def test_tokens_of_groups_that_are_thrown_away_were_generated(monkeypatch):
    engine, watch, drawn = replay.RecordedEngine, Watch(), []
    generate = engine.generate

    def counted(self, *arguments):
        completions = generate(self, *arguments)
        drawn.extend(len(completion.token_ids) for completion in completions)
        return completions

    monkeypatch.setattr(engine, "generate", counted)
    module, data, trainer, _ = replay.make(callbacks=[watch], **SETTINGS)
    trainer.fit(module, data)
    selected = sum(len(c.token_ids) for rollout in watch.rollouts for c in rollout.completions)
    assert module.tokens_generated == sum(drawn) > selected
    # Each of two epochs learns from the groups with a signal, all of which were selected.
    learned = sum(
        len(c.token_ids)
        for rollout, rewards in zip(watch.rollouts, watch.rewards, strict=True)
        for c, is_kept in zip(
            rollout.completions,
            DynamicSampling().keep(rewards.totals_B.view(4, 4), rewards.valid_B.view(4, 4)).repeat_interleave(4),
            strict=True,
        )
        if is_kept
    )
    assert module.tokens_trained == 2 * learned
