"""What vLLM builds a model from, before it is sent any weights."""

from copy import deepcopy
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_without_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model's config and its tokenizer."""
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
