"""A tiny decoder over characters, made from a config: the whole framework runs with nothing to download."""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from grpo_lightning.policy.source import PolicySource
from grpo_lightning.types import ConfigurationError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
DEFAULT_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/=()<>.,:;?!#|&% \n"


class CharacterPolicy(PolicySource):
    """A Llama-shaped decoder with random weights and one token per character.

    Args:
        characters: The alphabet; the vocabulary is these and ``<pad>``, ``<eos>``, ``<unk>``.
        hidden_size: Width of the residual stream.
        num_layers: Number of decoder layers.
        num_heads: Attention heads; `hidden_size` must be divisible by it.
        intermediate_size: Width of the gated feed-forward layer; None means 8/3 of `hidden_size`, rounded up to a
            multiple of 64, which matrix products like.
        max_positions: Longest sequence, prompt and completion.
        tie_embeddings: Whether the head shares the embedding's weights.
        init_std: Standard deviation of the random weights, > 0. The usual 0.02 is meant for models some thousand wide;
            a model of this size then sits still for its first hundreds of steps.

    Raises:
        ConfigurationError: A size is less than 1, the heads do not divide the width, or the alphabet repeats itself.
    """

    def __init__(
        self,
        characters: str = DEFAULT_CHARACTERS,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        max_positions: int = 512,
        tie_embeddings: bool = False,
        init_std: float = 0.04,
    ) -> None:
        sizes = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "intermediate_size": 1 if intermediate_size is None else intermediate_size,
            "max_positions": max_positions,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigurationError(f"model.policy.{name} must be >= 1, got {size}.")
        if len(set(characters)) != len(characters):
            twice = next(c for c in characters if characters.count(c) > 1)
            raise ConfigurationError(f"model.policy.characters names {twice!r} twice.")
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise ConfigurationError(
                f"model.policy.hidden_size must be an even multiple of model.policy.num_heads ({num_heads}), "
                f"got {hidden_size}."
            )
        if not init_std > 0:
            raise ConfigurationError(f"model.policy.init_std must be > 0, got {init_std}.")
        self.characters = characters
        self.config: dict[str, Any] = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size or -(-8 * hidden_size // (3 * 64)) * 64,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads,
            "max_position_embeddings": max_positions,
            "tie_word_embeddings": tie_embeddings,
            "initializer_range": init_std,
        }

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character of the alphabet."""
        vocabulary = {token: i for i, token in enumerate((PAD, EOS, UNKNOWN, *self.characters))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            eos_token=EOS,
            unk_token=UNKNOWN,
            clean_up_tokenization_spaces=False,
        )

    def load_model(self, *, seed: int) -> PreTrainedModel:
        """The decoder with its seeded random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(self._llama)

    def load_skeleton(self) -> PreTrainedModel:
        """The decoder without weights; of a subclass that changes it, what that makes."""
        if type(self).load_model is not CharacterPolicy.load_model:
            return super().load_skeleton()
        with torch.device("meta"):
            return LlamaForCausalLM(self._llama)

    @property
    def _llama(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(self.characters) + 3, pad_token_id=0, eos_token_id=1, bos_token_id=None, **self.config
        )
