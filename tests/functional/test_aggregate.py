import torch

from grpo_lightning.functional.aggregate import sequence_mean_token_mean, token_mean

#                          two loss tokens, and one
VALUES = torch.tensor([[2.0, 4.0, 99.0], [10.0, 99.0, 99.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_by_hand():
    # completions: (2 + 4) / 2 = 3 and 10 / 1 = 10
    assert sequence_mean_token_mean(VALUES, MASK, num_sequences=2).item() == 6.5
    assert token_mean(VALUES, MASK, num_tokens=3).item() == 16 / 3


def test_what_stands_in_the_padding_cannot_matter():
    poisoned = VALUES.masked_fill(~MASK, float("nan"))
    assert sequence_mean_token_mean(poisoned, MASK, num_sequences=2).item() == 6.5
    assert token_mean(poisoned, MASK, num_tokens=3).item() == 16 / 3


def test_parts_add_up_to_the_whole():
    for aggregate, count in ((sequence_mean_token_mean, {"num_sequences": 2}), (token_mean, {"num_tokens": 3})):
        parts = sum(aggregate(VALUES[i : i + 1], MASK[i : i + 1], **count) for i in range(2))
        torch.testing.assert_close(parts, aggregate(VALUES, MASK, **count), rtol=0, atol=1e-15)
