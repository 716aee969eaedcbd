import pytest
import torch

from grpo_lightning.rollout.attention import AttentionPattern
from grpo_lightning.rollout.cache import RowCache
from grpo_lightning.rollout.prefill import PromptStates

FULL = AttentionPattern(kinds=frozenset({"full_attention"}))
SLIDING = AttentionPattern(kinds=frozenset({"sliding_attention"}), window=2)
INF = torch.inf


def states(*prompts):
    """One layer, one head, width 1: a token's key is the token, its value the token's negative."""
    longest = max(map(len, prompts))
    keys = torch.tensor([[-99.0] * (longest - len(p)) + list(p) for p in prompts])[:, None, :, None]
    return PromptStates(keys=(keys,), values=(-keys,), logits_UV=torch.zeros(len(prompts), 3))


def step(cache, tokens):
    """Write a column; returns what each row may see: its visible keys."""
    mask = cache.masks(FULL)
    keys, values = cache.update(
        torch.tensor(tokens)[:, None, None, None], -torch.tensor(tokens)[:, None, None, None], 0
    )
    assert torch.equal(keys, -values)
    assert mask.shape == (len(tokens), 1, 1, keys.shape[2])
    cache.advance()
    return [row[seen].tolist() for row, seen in zip(keys[:, 0, :, 0], mask[:, 0, 0] == 0, strict=True)]


def test_rows_see_their_prompts_and_their_own_tokens():
    cache = RowCache()
    cache.begin(num_rows=3, longest_prompt=3)
    cache.append(states([1.0, 2.0, 3.0], [4.0]), prompt_of_row=[1, 0, 1], lengths=[1, 3, 1], names=[1, 0, 1])
    assert step(cache, [5.0, 6.0, 7.0]) == [[4, 5], [1, 2, 3, 6], [4, 7]]
    assert step(cache, [8.0, 9.0, 10.0]) == [[4, 5, 8], [1, 2, 3, 6, 9], [4, 7, 10]]


def test_masks_are_literally():
    cache = RowCache()
    cache.begin(num_rows=2, longest_prompt=3)
    cache.append(states([1.0, 2.0, 3.0], [4.0]), prompt_of_row=[0, 1], lengths=[3, 1], names=[0, 1])
    assert cache.masks(FULL).flatten(1).tolist() == [[0, 0, 0, 0], [-INF, -INF, 0, 0]]
    assert cache.masks(SLIDING).flatten(1).tolist() == [[-INF, -INF, 0, 0], [-INF, -INF, 0, 0]]


def test_both_kinds_of_layers_get_their_mask():
    pattern = AttentionPattern(kinds=frozenset({"sliding_attention", "full_attention"}), window=2)
    cache = RowCache()
    cache.begin(num_rows=1, longest_prompt=2)
    cache.append(states([1.0, 2.0]), prompt_of_row=[0], lengths=[2], names=[0])
    masks = {kind: mask.flatten().tolist() for kind, mask in cache.masks(pattern).items()}
    assert masks == {"full_attention": [0, 0, 0], "sliding_attention": [-INF, 0, 0]}


def test_the_last_rows_take_the_places_of_those_that_leave():
    cache = RowCache()
    cache.begin(num_rows=5, longest_prompt=2)
    cache.append(
        states([1.0, 2.0], [3.0]), prompt_of_row=[0, 0, 1, 1, 1], lengths=[2, 2, 1, 1, 1], names=[0, 0, 1, 1, 1]
    )
    step(cache, [10.0, 11.0, 12.0, 13.0, 14.0])
    assert cache.remove([3, 1]) == [0, 4, 2]
    assert step(cache, [20.0, 24.0, 22.0]) == [[1, 2, 10, 20], [3, 14, 24], [3, 12, 22]]
    assert cache.remove([0]) == [2, 1]
    # The longest live row has one token of prompt and two of its own: the view holds no more than that.
    assert cache.get_seq_length() == 3
    assert step(cache, [32.0, 34.0]) == [[3, 12, 22, 32], [3, 14, 24, 34]]
    assert cache.remove([0, 1]) == []


def test_rows_enter_beside_rows_that_are_under_way():
    cache = RowCache()
    cache.begin(num_rows=2, longest_prompt=3)
    cache.append(states([4.0]), prompt_of_row=[0], lengths=[1], names=[0])
    step(cache, [5.0])
    cache.append(states([1.0, 2.0, 3.0]), prompt_of_row=[0], lengths=[3], names=[0])
    assert step(cache, [6.0, 7.0]) == [[4, 5, 6], [1, 2, 3, 7]]


@pytest.mark.parametrize("lifetime", [3, 200])
def test_rows_come_and_go_for_longer_than_the_buffer_is_wide(lifetime):
    cache = RowCache()
    cache.begin(num_rows=2, longest_prompt=30)
    expected, number = [], 0.0
    for turn in range(700):
        for row in [row for row, seen in reversed(list(enumerate(expected))) if len(seen) >= lifetime + row]:
            order = cache.remove([row])
            expected = [expected[i] for i in order]
        if len(expected) < 2 and turn % 5:
            prompt = [number + i / 100 for i in range(30 if turn % 7 == 1 else turn % 4 + 1)]
            cache.append(states(prompt), prompt_of_row=[0], lengths=[len(prompt)], names=[0])
            expected.append(torch.tensor(prompt).tolist())
        if not expected:
            continue
        tokens = [number + 1 + row for row in range(len(expected))]
        number += 2
        expected = [[*seen, token] for seen, token in zip(expected, tokens, strict=True)]
        assert step(cache, tokens) == expected
    assert cache._mask.shape[1] < 2 * lifetime + 200


def test_begin_forgets_the_rows_but_keeps_the_memory():
    cache = RowCache()
    cache.begin(num_rows=2, longest_prompt=1)
    cache.append(states([1.0]), prompt_of_row=[0, 0], lengths=[1, 1], names=[0, 0])
    step(cache, [2.0, 3.0])
    memory = cache._storage[0].data_ptr()
    cache.begin(num_rows=1, longest_prompt=2)
    cache.append(states([4.0, 5.0]), prompt_of_row=[0], lengths=[2], names=[0])
    assert step(cache, [6.0]) == [[4, 5, 6]]
    assert cache._storage[0].data_ptr() == memory


def test_another_precision_gets_another_buffer():
    cache = RowCache()
    for dtype in (torch.float32, torch.float64):
        prompt = states([1.0])
        prompt = PromptStates(
            keys=(prompt.keys[0].to(dtype),), values=(prompt.values[0].to(dtype),), logits_UV=prompt.logits_UV
        )
        cache.begin(num_rows=1, longest_prompt=1)
        cache.append(prompt, prompt_of_row=[0], lengths=[1], names=[0])
        assert cache.masks(FULL).dtype == dtype
