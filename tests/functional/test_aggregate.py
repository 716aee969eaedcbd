import torch

from grpo_lightning.functional.aggregate import (
    prompt_mean_token_mean,
    sequence_mean_token_mean,
    sequence_sum,
    token_mean,
)

# Two completions of one prompt, of two loss tokens and one, and one of another prompt.
VALUES = torch.tensor([[2.0, 4.0, 99.0], [10.0, 99.0, 99.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
GROUP_TOKENS = torch.tensor([3, 3, 3])

EACH = {
    # completions: (2 + 4) / 2 = 3, 10 / 1 = 10 and (7 + 8 + 9) / 3 = 8
    "sequences": (lambda v, m, g: sequence_mean_token_mean(v, m, num_sequences=3), 7.0),
    "tokens": (lambda v, m, g: token_mean(v, m, num_tokens=6), 40 / 6),
    # groups: (2 + 4 + 10) / 3 and 24 / 3
    "prompts": (lambda v, m, g: prompt_mean_token_mean(v, m, g, num_groups=2), (16 / 3 + 8) / 2),
    # sums: 6, 10 and 24
    "sum": (lambda v, m, g: sequence_sum(v, m, num_sequences=3), 40 / 3),
}


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-14)


def test_by_hand():
    for aggregate, want in EACH.values():
        close(aggregate(VALUES, MASK, GROUP_TOKENS), want)


def test_what_stands_in_the_padding_cannot_matter():
    poisoned = VALUES.masked_fill(~MASK, float("nan"))
    for aggregate, want in EACH.values():
        close(aggregate(poisoned, MASK, GROUP_TOKENS), want)


def test_parts_add_up_to_the_whole():
    for aggregate, want in EACH.values():
        parts = sum(aggregate(VALUES[i : i + 1], MASK[i : i + 1], GROUP_TOKENS[i : i + 1]) for i in range(3))
        close(parts, want)


def test_one_value_per_completion_stands_for_each_of_its_tokens():
    values = torch.tensor([[2.0], [10.0], [7.0]], dtype=torch.float64)
    close(sequence_mean_token_mean(values, MASK, num_sequences=3), 19 / 3)
    close(sequence_sum(values, MASK, num_sequences=3), (4 + 10 + 21) / 3)
