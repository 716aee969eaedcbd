"""When a completion ends: an end-of-sequence token, a stop string, or the length limit."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_lightning.types import ConfigurationError, SamplingParams

# A character is at most four tokens of a byte-level vocabulary; the rest is for tokens that decode to nothing.
_TOKENS_PER_CHARACTER, _SPARE_TOKENS = 4, 8


class FinishRules:
    """Says which tokens may end a completion, and whether a stop string does.

    Args:
        tokenizer: Decodes completions for the stop strings.
        eos_token_ids: Tokens that end a sequence.
        sampling: Its stop strings.
        vocabulary: V, the number of logits.
        device: Where tokens are drawn.

    Raises:
        ConfigurationError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: frozenset[int],
        sampling: SamplingParams,
        *,
        vocabulary: int,
        device: torch.device,
    ) -> None:
        if "" in sampling.stop:
            raise ConfigurationError("model.sampling.stop must hold non-empty strings, got ''.")
        self._tokenizer = tokenizer
        self._stop = sampling.stop
        self._tail = max((_TOKENS_PER_CHARACTER * len(s) + _SPARE_TOKENS for s in sampling.stop), default=0)
        self.eos_token_ids = eos_token_ids
        self.eos_E = torch.tensor(
            sorted(token for token in eos_token_ids if token < vocabulary), dtype=torch.long, device=device
        )
        """int64: the tokens that end a sequence and have a logit."""
        self.may_end_V = self._may_complete_stop(vocabulary).to(device).index_fill_(0, self.eos_E, True)
        """bool: tokens that need a closer look; drawing any other one ends nothing."""

    def reaches_stop(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token of a completion, in which no earlier one did so, completes a stop string.

        Special tokens count with their text here, so that a stop string may name one.
        """
        if not self._stop:
            return False
        text = self._tokenizer.decode(list(token_ids[-self._tail :]), skip_special_tokens=False)
        return any(stop in text for stop in self._stop)

    def _may_complete_stop(self, vocabulary: int) -> Tensor:
        """The tokens whose text has the last character of a stop string."""
        may_complete_V = torch.zeros(vocabulary, dtype=torch.bool)
        if not self._stop:
            return may_complete_V
        endings = {stop[-1] for stop in self._stop}
        if any(not ending.isascii() or ending == " " for ending in endings):
            # Bytes of one character may be spread over tokens, and some tokenizers drop a token's leading space.
            return ~may_complete_V
        num_tokens = min(vocabulary, len(self._tokenizer))
        texts = self._tokenizer.batch_decode([[token] for token in range(num_tokens)], skip_special_tokens=False)
        may_complete_V[[token for token, text in enumerate(texts) if not endings.isdisjoint(text)]] = True
        return may_complete_V
