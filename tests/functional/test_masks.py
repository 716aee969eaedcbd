import math

import pytest
import torch

from grpo_lightning.functional.masks import near_policy_sequences, top_entropy_threshold

MASK = torch.tensor([[True, True, False]] * 4)
# The policy's mean log-probability fell by 0.3, 0.3, 0.1 and rose by 0.3; what stands in the padding cannot matter.
SAMPLER = torch.tensor([[-1.0, -1.0, 0.0]] * 4)
LOGPROBS = torch.tensor([[-1.5, -1.1, 9.0], [-1.5, -1.1, 9.0], [-1.1, -1.1, 9.0], [-0.7, -0.7, 9.0]])
ADVANTAGES = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0]])


def test_only_a_bad_completion_that_the_policy_left_behind_is_masked():
    keep = near_policy_sequences(LOGPROBS, SAMPLER, ADVANTAGES, MASK, max_drift=0.2)
    assert keep[:, 0].tolist() == [False, True, True, True]


def test_an_infinite_threshold_masks_nothing():
    assert near_policy_sequences(LOGPROBS, SAMPLER, ADVANTAGES, MASK, max_drift=math.inf).all()


def test_it_is_a_bound_on_the_geometric_mean_of_the_ratio():
    ratio = ((LOGPROBS - SAMPLER)[:, :2].mean(dim=1)).exp()
    for max_drift in (0.05, 0.2, 0.4):
        keep = near_policy_sequences(LOGPROBS, SAMPLER, ADVANTAGES, MASK, max_drift=max_drift)[:, 0]
        assert torch.equal(keep, (ratio >= math.exp(-max_drift)) | (ADVANTAGES[:, 0] >= 0))


def test_advantages_of_tokens_are_looked_at_one_by_one():
    advantages = torch.tensor([[-1.0, 1.0, 0.0]])
    keep = near_policy_sequences(LOGPROBS[:1], SAMPLER[:1], advantages, MASK[:1], max_drift=0.2)
    assert keep.tolist() == [[False, True, True]]


@pytest.mark.parametrize(("share", "kept"), [(0.2, 2), (0.21, 3), (0.01, 1), (1.0, 10)])
def test_the_share_is_rounded_up(share, kept):
    entropies = torch.randperm(10, generator=torch.Generator().manual_seed(0)).double()
    assert int((entropies >= top_entropy_threshold(entropies, share=share)).sum()) == kept


def test_ties_with_the_last_are_kept_and_no_tokens_need_no_threshold():
    assert top_entropy_threshold(torch.tensor([1.0, 1.0, 1.0, 0.0]), share=0.25) == 1.0
    assert top_entropy_threshold(torch.tensor([]), share=0.2) == math.inf
