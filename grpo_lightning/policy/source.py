"""Where a policy comes from."""

from abc import ABC, abstractmethod

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PolicySource(ABC):
    """Loads the tokenizer and the model of a policy. Cheap to build: nothing is loaded before it is asked for.

    The tokenizer comes first and alone, so that data and settings are checked before any weights are read.
    """

    @abstractmethod
    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with an end-of-sequence token.

        Raises:
            ConfigurationError: What it should come from is not there, or has no tokenizer.
        """

    @abstractmethod
    def load_model(self, *, seed: int) -> PreTrainedModel:
        """The model in its training precision, on the CPU.

        Args:
            seed: Of whatever weights are random; the global random state is left as it was.

        Raises:
            ConfigurationError: What it should come from is not there, or is no causal language model.
        """

    def load_skeleton(self) -> PreTrainedModel:
        """The model without its weights, on the meta device: shapes and precision alone.

        Raises:
            ConfigurationError: What it should come from is not there, or is no causal language model.
        """
        with torch.device("meta"):
            return self.load_model(seed=0)
