import torch

from grpo_lightning.rollout.attention import AttentionPattern

NO = -torch.inf
FULL, SLIDING = "full_attention", "sliding_attention"
# Two rows with one new token each, over four keys that lie 3, 2, 1 and 0 positions before it; the second row's prompt
# is one token shorter, so that its first key is hidden.
MASK = torch.tensor([[0.0, 0.0, 0.0, 0.0], [NO, 0.0, 0.0, 0.0]])[:, None, None]
DISTANCES = torch.tensor([[3, 2, 1, 0]])


def rows(mask):
    return mask[:, 0, 0].tolist()


def test_full_attention_sees_what_the_mask_shows():
    assert AttentionPattern(kinds=frozenset({FULL})).masks(MASK, DISTANCES) is MASK


def test_a_window_of_two_sees_a_token_and_the_one_before_it():
    masks = AttentionPattern(kinds=frozenset({SLIDING}), window=2).masks(MASK, DISTANCES)
    assert rows(masks) == [[NO, NO, 0.0, 0.0], [NO, NO, 0.0, 0.0]]


def test_a_window_as_long_as_the_sequence_hides_nothing_and_shows_nothing():
    masks = AttentionPattern(kinds=frozenset({SLIDING}), window=4).masks(MASK, DISTANCES)
    assert rows(masks) == rows(MASK)


def test_layers_of_both_kinds_have_a_mask_each():
    masks = AttentionPattern(kinds=frozenset({FULL, SLIDING}), window=3).masks(MASK, DISTANCES)
    assert set(masks) == {FULL, SLIDING}
    assert rows(masks[FULL]) == rows(MASK)
    assert rows(masks[SLIDING]) == [[NO, 0.0, 0.0, 0.0], [NO, 0.0, 0.0, 0.0]]


def test_the_mask_that_was_given_stays_as_it_was():
    before = MASK.clone()
    AttentionPattern(kinds=frozenset({SLIDING}), window=1).masks(MASK, DISTANCES)
    assert torch.equal(MASK, before)
