import torch

from grpo_lightning.batching import IterationShape, cut_into_minibatches, global_counts
from grpo_lightning.types import Completion, FinishReason, MinibatchCounts, Prompt, Rollout


def completion(*token_ids, loss_mask=None):
    return Completion(
        token_ids=token_ids,
        sampler_logprobs=(0.0,) * len(token_ids),
        text="",
        finish_reason=FinishReason.LENGTH,
        loss_mask=loss_mask,
    )


def rollout(slots, completions):
    prompts = tuple(Prompt(index=90 + s, token_ids=(s,), text=str(s)) for s in slots)
    return Rollout(iteration=0, slots=tuple(slots), prompts=prompts, completions=tuple(completions))


def shape(num_minibatches):
    return IterationShape(prompts_per_iteration=4, group_size=2, num_epochs=1, num_minibatches=num_minibatches)


def places(minibatches):
    return [[(s.slot, s.index) for s in samples] for samples in minibatches]


COMPLETIONS = [completion(10), completion(11, 12), completion(13), completion(14)]
ALL = torch.ones(4, dtype=torch.bool)


def test_samples_by_hand():
    # Rank 1 of 2 has the slots 1 and 3 of four prompts: one in each half.
    first, second = cut_into_minibatches(rollout([1, 3], COMPLETIONS), ALL, shape(2))
    assert places([first, second]) == [[(1, 0), (1, 1)], [(3, 0), (3, 1)]]
    assert [s.prompt_ids.tolist() for s in first] == [[1], [1]]
    assert [s.completion_ids.tolist() for s in first] == [[10], [11, 12]]
    assert [s.loss_mask.tolist() for s in first] == [[True], [True, True]]
    assert [s.group_tokens for s in first + second] == [3, 3, 2, 2]


def test_which_minibatch_a_prompt_is_in_does_not_depend_on_the_ranks():
    one = cut_into_minibatches(rollout(range(4), COMPLETIONS * 2), ALL.repeat(2), shape(2))
    ranks = [cut_into_minibatches(rollout(slots, COMPLETIONS), ALL, shape(2)) for slots in ([0, 2], [1, 3])]
    two = [sorted(places(ranks[0])[m] + places(ranks[1])[m]) for m in range(2)]
    assert places(one) == two == [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1), (3, 0), (3, 1)]]


def test_a_completion_that_is_not_learned_from_leaves_no_sample():
    learned = torch.tensor([True, False, False, False])
    assert places(cut_into_minibatches(rollout([0, 2], COMPLETIONS), learned, shape(2))) == [[(0, 0)], []]


def test_tokens_that_the_policy_did_not_draw_are_masked():
    tool_output_alone = completion(7, loss_mask=(False,))
    tool_output_first = completion(7, 8, loss_mask=(False, True))
    drawn = rollout([0], [tool_output_alone, tool_output_first])
    (samples,) = cut_into_minibatches(drawn, ALL[:2], shape(1))
    assert [(s.index, s.loss_mask.tolist()) for s in samples] == [(1, [False, True])]


def test_counts_by_hand():
    masked = completion(1, 2, 3, loss_mask=(True, False, True))
    drawn = rollout([0, 1], [masked, completion(4), completion(5, 6), completion(7)])
    learned = torch.tensor([True, True, True, False])
    minibatches = cut_into_minibatches(drawn, learned, shape(1))
    # Tokens 2 + 1 + 2; three completions; of two prompts.
    assert global_counts(minibatches, list) == [MinibatchCounts(tokens=5, sequences=3, groups=2)]


def test_counts_are_added_up_over_ranks_in_one_call():
    calls = []

    def another_rank_has_twice_as_much(values):
        calls.append(values)
        return [3.0 * value for value in values]

    minibatches = cut_into_minibatches(rollout([0, 2], COMPLETIONS), ALL, shape(2))
    assert global_counts(minibatches, another_rank_has_twice_as_much) == [
        MinibatchCounts(tokens=9, sequences=6, groups=3),
        MinibatchCounts(tokens=6, sequences=6, groups=3),
    ]
    assert len(calls) == 1


def test_a_minibatch_without_samples_counts_nothing():
    assert global_counts([[], []], list) == [MinibatchCounts(0, 0, 0)] * 2
