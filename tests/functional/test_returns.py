import pytest
import torch

from grpo_lightning.functional.advantages import group_normalized_advantages
from grpo_lightning.functional.returns import suffix_sums


def test_a_token_is_credited_with_itself_and_what_follows():
    got = suffix_sums(torch.tensor([[1.0, 0.0, -3.0, 0.0], [0.0, 0.0, 0.0, 2.0]]))
    assert got.tolist() == [[-2.0, -3.0, -3.0, 0.0], [2.0, 2.0, 2.0, 2.0]]


def test_process_supervision_by_hand():
    # Two completions with steps (1, 0) and (1, 1): pooled mean .75 and population deviation sqrt(3)/4, so that the
    # normalised scores are 1/sqrt(3) and -sqrt(3). The steps end at tokens 1 and 2.
    pool = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    scores = group_normalized_advantages(pool, torch.ones_like(pool, dtype=torch.bool), ddof=0, epsilon=0.0).view(2, 2)
    tokens = torch.zeros(2, 4, dtype=torch.float64)
    tokens[:, 1:3] = scores
    a, b = 3**-0.5, -(3**0.5)
    want = torch.tensor([[a + b, a + b, b, 0.0], [2 * a, 2 * a, a, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(suffix_sums(tokens), want, rtol=0, atol=1e-14)
    assert want[0, 0].item() == pytest.approx(-2 / 3**0.5)
