from dataclasses import replace

import pytest
import torch
from torch import nn

from grpo_lightning.batching import Experience, Forward, InStep, Padded, Sample
from grpo_lightning.batching.experience import blank_sample
from grpo_lightning.types import LossOutput, MinibatchCounts, Statistic, TokenScores


class Table(nn.Module):
    """A policy that scores a token by a weight of its own, whatever came before, over the temperature."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, -1, 10, dtype=torch.float64))
        self.num_rows = []

    def forward(self, batch, temperature):
        self.num_rows.append(batch.num_completions)
        scores_N = self.weight[batch.targets_N] / temperature
        zeros_BT = scores_N.new_zeros(batch.num_completions, batch.max_completion_tokens)
        return TokenScores(zeros_BT.index_put((batch.rows_N, batch.columns_N), scores_N), zeros_BT)


def sample(slot, *token_ids):
    return Sample(
        slot=slot,
        index=0,
        prompt_ids=torch.tensor([1, 2]),
        completion_ids=torch.tensor(token_ids),
        loss_mask=torch.ones(len(token_ids), dtype=torch.bool),
        group_tokens=len(token_ids),
        advantages=torch.tensor([slot + 1], dtype=torch.float64),
    )


def weighted(scores, batch):
    """The log-probabilities times advantages, and how many tokens there were."""
    tokens = batch.mask_BT.sum().double()
    loss = (scores.logprobs_BT * batch.advantages_BT * batch.mask_BT).sum()
    return LossOutput(loss, {"tokens": Statistic(tokens, torch.ones(()))})


SAMPLES = [sample(0, 3), sample(1, 4, 5), sample(2, 6, 7, 8), sample(3, 9)]
BLANK = replace(blank_sample(), advantages=torch.zeros(1, dtype=torch.float64))
FORWARD = Forward(layout=Padded(), temperature=0.5, max_tokens=None, device=torch.device("cpu"))
IN_PIECES = replace(FORWARD, max_tokens=6)  # prompts of two tokens: at most two of the shorter ones, padded, at once


def experience_of(*minibatches, accumulate=1):
    return Experience.build(
        iteration=0,
        minibatches=minibatches,
        counts=[MinibatchCounts(6, 3, 3)] * len(minibatches),
        metrics={},
        accumulate_grad_batches=accumulate,
        layout=Padded(),
        blank=BLANK,
    )


def gradient(forward, samples, **agreed):
    """Of one micro-batch; its outputs, and how many forwards there were before the backward pass."""
    policy = Table()
    experience = replace(experience_of(samples), **agreed)
    outputs = list(forward.losses(policy, forward.pieces(experience, 0, 0), weighted))
    num_forwards = len(policy.num_rows)
    loss = sum(output.loss for output in outputs)
    loss.backward()
    return loss.item(), policy.weight.grad, outputs, num_forwards, policy


def test_the_loss_by_hand():
    loss, grad, (output,), num_forwards, policy = gradient(FORWARD, SAMPLES[:2])
    # Token 3 with advantage 1; tokens 4 and 5 with advantage 2; the temperature 0.5 doubles each score.
    weight = policy.weight
    expected = 2 * (1 * weight[3] + 2 * (weight[4] + weight[5]))
    assert loss == pytest.approx(expected.item(), rel=1e-15)
    assert grad.tolist() == [0, 0, 0, 2, 4, 4, 0, 0, 0, 0]
    assert output.statistics["tokens"].sum == 3
    assert num_forwards == 1


def test_pieces_have_the_same_loss_and_gradient_as_the_whole():
    whole, in_pieces = gradient(FORWARD, SAMPLES), gradient(IN_PIECES, SAMPLES)
    assert len(in_pieces[2]) == 3  # 5; 4; 3 and 3 tokens
    assert in_pieces[0] == pytest.approx(whole[0], rel=1e-14)  # the same sums, in another order
    torch.testing.assert_close(in_pieces[1], whole[1], rtol=1e-14, atol=0)
    assert sum(output.statistics["tokens"].sum for output in in_pieces[2]) == 7


def test_only_pieces_are_computed_again_in_the_backward_pass():
    assert len(gradient(FORWARD, SAMPLES)[4].num_rows) == 1
    *_, num_forwards, policy = gradient(IN_PIECES, SAMPLES)
    assert (num_forwards, len(policy.num_rows)) == (3, 6)


def test_the_blank_sample_has_a_zero_that_depends_on_the_weights_and_the_same_statistics():
    loss, grad, (output,), num_forwards, _ = gradient(FORWARD, [])
    assert (loss, num_forwards, output.statistics["tokens"].sum) == (0, 1, 0)
    assert grad is not None
    assert not grad.any()


def in_step(*others):
    """With other ranks, whose micro-batches have so many pieces."""

    def agree(mine):
        assert len(mine) == len(others)
        return list(map(max, mine, others))

    return replace(IN_PIECES, in_step=InStep(agree, lambda loss: loss.backward()))


def test_ranks_in_step_make_the_most_pieces_that_one_of_them_has():
    forward = in_step(1, 4, 2)
    experience = forward.agreed(experience_of(SAMPLES, SAMPLES[:3], []))
    assert experience.num_pieces == ((3,), (4,), (2,))
    pieces = [[[s.slot for s in piece] for piece in forward.pieces(experience, m, 0)] for m in range(3)]
    assert pieces == [[[2], [1], [0, 3]], [[2], [1], [0], [-1]], [[-1], [-1]]]
    assert forward.pieces(experience, 4, 0) == forward.pieces(experience, 1, 0)  # the second epoch's
    without_limit = replace(forward, max_tokens=None)
    assert without_limit.agreed(experience_of(SAMPLES)).num_pieces is None  # and nobody was asked


@pytest.mark.parametrize("num_pieces", [3, 4, 7])
def test_pieces_in_step_have_the_gradient_of_the_whole_and_leave_no_graph(num_pieces):
    whole = gradient(FORWARD, SAMPLES)
    loss, grad, outputs, num_forwards, policy = gradient(in_step(num_pieces), SAMPLES, num_pieces=((num_pieces,),))
    assert loss == pytest.approx(whole[0], rel=1e-14)  # the same sums, in another order
    torch.testing.assert_close(grad, whole[1], rtol=1e-14, atol=0)
    assert sum(output.statistics["tokens"].sum for output in outputs) == 7
    assert [output.loss.requires_grad for output in outputs] == [False] * (num_pieces - 1) + [True]
    assert (num_forwards, len(policy.num_rows)) == (num_pieces, num_pieces)  # nothing is computed again


@pytest.mark.parametrize("forward", [FORWARD, IN_PIECES])
def test_every_sample_is_scored_by_its_place(forward):
    experience = experience_of(SAMPLES[:3], SAMPLES[3:], accumulate=2)
    policy = Table()
    scores = forward.scores(policy, experience)
    assert list(experience.samples()) == SAMPLES
    for of in SAMPLES:
        assert torch.equal(scores.logprobs[of.place], 2 * policy.weight[of.completion_ids])
        assert torch.equal(scores.entropies[of.place], torch.zeros(len(of.completion_ids)))
        assert not scores.logprobs[of.place].requires_grad
    logprobs = forward.logprobs(policy, experience)
    assert {place: row.tolist() for place, row in logprobs.items()} == {
        place: row.tolist() for place, row in scores.logprobs.items()
    }
