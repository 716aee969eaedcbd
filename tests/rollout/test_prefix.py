import math

import pytest
import torch

from grpo_lightning.rollout.prefill import PromptStates
from grpo_lightning.rollout.prefix import SharedPrefixes, SharingCache, attend, join


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def states(*prompts):
    """One layer, one head, width 1: a token's key is 0, its value the token."""
    longest = max(map(len, prompts))
    values = torch.tensor([[-99.0] * (longest - len(p)) + list(p) for p in prompts])[:, None, :, None]
    return PromptStates(keys=(torch.zeros_like(values),), values=(values,), logits_UV=torch.zeros(len(prompts), 3))


def read(prefixes, num_rows):
    """With keys of 0 every token weighs the same: a row reads the mean of its prompt, and e^0 = 1 for each token."""
    output, log_total = prefixes.attend(0, torch.zeros(num_rows, 1, 1, 1))
    return output.flatten().tolist(), log_total.exp().flatten().tolist()


def test_attention_is_worked_by_hand():
    # Scores ln 1 and ln 3, so that the weights are 1/4 and 3/4 and the exponentials add up to 4.
    found = attend(torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([[8.0], [4.0]]), None)
    assert found.output.item() == pytest.approx(0.25 * 8 + 0.75 * 4)
    assert found.log_total.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_joined_parts_are_attention_over_all_keys(scale):
    query, keys, values = scale * random(3, 2, 4, 8), random(3, 2, 11, 8, seed=1), random(3, 2, 11, 5, seed=2)
    parts = [attend(query, keys[:, :, part], values[:, :, part], None) for part in (slice(7), slice(7, None))]
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=1.0)
    # float64 carries 16 digits; scores of up to 1e4 keep 12 of them.
    torch.testing.assert_close(join(*parts), expected, atol=1e-11, rtol=0)


def test_a_softcap_bounds_the_scores():
    query, keys, values = torch.tensor([[1.0]]), torch.tensor([[1e6], [0.0]]), torch.tensor([[1.0], [0.0]])
    # The scores are 2 tanh(inf) = 2 and 0.
    found = attend(query, keys, values, None, softcap=2.0).output.item()
    assert found == pytest.approx(math.exp(2) / (math.exp(2) + 1))


def test_rows_read_their_prompts_in_any_order():
    prefixes = SharedPrefixes()
    prefixes.append(states([1.0, 2.0, 3.0], [4.0]), prompts=[1, 0, 1, 1], names=[8, 7, 8, 8], lengths=[1, 3, 1, 1])
    assert read(prefixes, 4) == ([4, 2, 4, 4], pytest.approx([1, 3, 1, 1]))


def test_a_prompt_is_held_once_whenever_its_rows_come():
    prefixes = SharedPrefixes()
    for _ in range(2):
        prefixes.append(states([1.0, 3.0]), prompts=[0, 0], names=[5, 5], lengths=[2, 2])
    prefixes.append(states([9.0]), prompts=[0], names=[6], lengths=[1])
    assert read(prefixes, 5) == ([2, 2, 2, 2, 9], pytest.approx([2, 2, 2, 2, 1]))
    assert prefixes._keys[0].shape == (2, 1, 2, 1)


def test_prompts_leave_with_their_last_rows():
    prefixes = SharedPrefixes()
    prefixes.append(states([1.0, 2.0, 3.0], [4.0]), prompts=[0, 1, 1], names=[0, 1, 1], lengths=[3, 1, 1])
    prefixes.keep([2, 0])
    assert read(prefixes, 2) == ([4, 2], pytest.approx([1, 3]))
    prefixes.keep([0])
    assert read(prefixes, 1) == ([4], pytest.approx([1]))
    assert prefixes._values[0].shape == (1, 1, 1, 1)
    prefixes.keep([])
    prefixes.append(states([5.0, 7.0]), prompts=[0], names=[2], lengths=[2])
    assert read(prefixes, 1) == ([6], pytest.approx([2]))


def test_rows_of_a_sharing_cache_hold_their_own_tokens_alone():
    cache = SharingCache()
    cache.begin(num_rows=3, longest_prompt=3)
    cache.append(states([1.0, 2.0, 3.0], [4.0]), prompt_of_row=[0, 0, 1], lengths=[3, 3, 1], names=[0, 0, 1])
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(torch.ones(3, 1, 1, 1), torch.ones(3, 1, 1, 1), 0)
    assert keys.shape == (3, 1, 1, 1)
    cache.advance()
    assert cache.remove([0]) == [2, 1]
    assert read(cache._prefixes, 2) == ([4, 2], pytest.approx([1, 3]))
