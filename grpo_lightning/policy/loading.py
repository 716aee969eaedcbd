"""The policy of a run, as its settings want it trained."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.policy.lora import LoRA
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.source import PolicySource
from grpo_lightning.types import ConfigurationError


def load_policy(
    source: PolicySource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    lora: LoRA | None = None,
    gradient_checkpointing: bool = False,
) -> Policy:
    """Load a model and make a policy of it.

    Args:
        source: Of the model.
        tokenizer: The source's.
        seed: Of whatever weights are random.
        lora: What is trained; None for all weights.
        gradient_checkpointing: See `recompute_layers`.

    Raises:
        ConfigurationError: The model cannot be loaded, or does not fit the settings.
    """
    model = source.load_model(seed=seed)
    base_checksum = None if lora is None else lora.adapt(model, seed=seed)
    if gradient_checkpointing:
        recompute_layers(model)
    return Policy(model, tokenizer, base_checksum=base_checksum)


def recompute_layers(model: PreTrainedModel) -> None:
    """Have the backward pass compute each layer again, so that the activations of one alone are in memory.

    Rollouts, which need no gradient, are as before. Source: Chen et al. (https://arxiv.org/abs/1604.06174).

    Raises:
        ConfigurationError: The model cannot.
    """
    # Older versions have the old name alone, newer ones warn of it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "preserve_rng_state": False})  # there is no dropout
    except ValueError as error:
        raise ConfigurationError(f"model.gradient_checkpointing: the policy cannot: {error}") from error
    model.disable_input_require_grads()  # for reentrant checkpoints, which these are not
