"""Whether prompts and completions fit into the positions that the policy has."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from grpo_lightning.types import ConfigurationError, GenerationRequest, SamplingParams


def check_lengths(requests: Sequence[GenerationRequest], sampling: SamplingParams, config: PreTrainedConfig) -> None:
    """The longest prompt and its completion have at most as many tokens as the policy has positions.

    Raises:
        ConfigurationError: They have more, or a prompt is empty.
    """
    lengths = [len(request.token_ids) for request in requests if request.num_completions]
    if lengths and min(lengths) == 0:
        raise ConfigurationError("data: a prompt has no tokens, expected at least one.")
    limit = max_positions(config)
    if lengths and limit is not None and max(lengths) + sampling.max_new_tokens > limit:
        raise ConfigurationError(
            f"model.sampling.max_new_tokens: a prompt of {max(lengths)} tokens and {sampling.max_new_tokens} new "
            f"ones exceed the policy's {limit} positions."
        )


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a policy with this config can read; None where it has no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit
