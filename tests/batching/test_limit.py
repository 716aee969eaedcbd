import warnings

import pytest

from grpo_lightning.batching.limit import warn_of_long_sequences
from grpo_lightning.types import Prompt

PROMPTS = [Prompt(index=i, token_ids=(1,) * length, text="") for i, length in enumerate((3, 7, 5))]


def test_a_limit_that_a_sequence_can_exceed_is_told():
    with pytest.warns(
        UserWarning, match=r"max_tokens_per_microbatch is 16, .* 7 tokens of prompt and 10 of completion"
    ):
        warn_of_long_sequences(16, PROMPTS, 10)


@pytest.mark.parametrize("limit", [17, None])
def test_a_limit_that_holds_needs_no_words(limit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long_sequences(limit, PROMPTS, 10)
