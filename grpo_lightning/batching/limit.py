"""What a limit on the tokens that are computed at once cannot hold."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.types import Prompt


def warn_of_long_sequences(
    max_tokens_per_microbatch: int | None, prompts: Sequence[Prompt], max_new_tokens: int
) -> None:
    """Say that a sequence is not cut, where one can be longer than what may be computed at once.

    Args:
        max_tokens_per_microbatch: Of the module.
        prompts: That are trained on.
        max_new_tokens: Of a completion.
    """
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if max_tokens_per_microbatch is not None and longest + max_new_tokens > max_tokens_per_microbatch:
        rank_zero_warn(
            f"model.max_tokens_per_microbatch is {max_tokens_per_microbatch}, and a sequence can have {longest} tokens "
            f"of prompt and {max_new_tokens} of completion (model.sampling.max_new_tokens): one longer than the limit "
            "is computed by itself, whole, and takes more memory than the limit allows."
        )
