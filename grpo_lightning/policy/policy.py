"""The policy: a causal language model, its tokenizer, and the log-probabilities of given completions."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from grpo_lightning.functional.head import Head, head_logprobs_and_entropy
from grpo_lightning.functional.logprobs import logprobs_and_entropy
from grpo_lightning.policy.adaptation import is_adapted
from grpo_lightning.policy.adapter_folder import save_adapter
from grpo_lightning.policy.lean_layers import lean_layers, make_lean, put_lean_layers
from grpo_lightning.policy.segments import SegmentedModel
from grpo_lightning.policy.traits import Traits, head_kind
from grpo_lightning.policy.weights import NamedWeights
from grpo_lightning.types import ForwardBatch, TokenScores


class Policy(nn.Module):
    """A causal language model of transformers with its tokenizer.

    Args:
        model: Any causal language model, with or without an adapter; dropout is switched off, and layers are replaced
            where `make_lean` says so.
        tokenizer: Its tokenizer.
        base_checksum: Of the model's own weights, where it has an adapter, or is the reference as it was loaded.
        traits: Of the same model, where this one is without weights; None to ask it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base_checksum: int | None = None,
        traits: Traits | None = None,
    ) -> None:
        super().__init__()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if traits is None:
            make_lean(model)
        else:
            put_lean_layers(model, traits.lean_layers)
        self.model = model.train()  # what a folder holds is loaded in eval mode; without dropout the modes are the same
        self.tokenizer = tokenizer
        self.base_checksum = base_checksum
        self._head = head_kind(model) if traits is None else traits.head
        self._segmented = SegmentedModel(model)
        if traits is not None:
            self.follows_segments = traits.follows_segments

    @cached_property
    def follows_segments(self) -> bool:
        """Whether the model can score a flat row of several sequences."""
        return self._segmented.is_exact()

    @property
    def traits(self) -> Traits:
        """What a copy without weights is told."""
        return Traits(lean_layers=lean_layers(self.model), head=self._head, follows_segments=self.follows_segments)

    @property
    def weights(self) -> NamedWeights:
        """The model's weights, for engines that have a copy."""
        return NamedWeights(self.model)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a completion, of the generation config and of the tokenizer."""
        generation_config = self.model.generation_config
        configured = generation_config.eos_token_id if generation_config is not None else None
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    def forward(self, batch: ForwardBatch, temperature: float, *, entropy_gradient: bool = False) -> TokenScores:
        """Score the completion tokens of `batch`: their log-probability and entropy at `temperature`.

        Only the states that predict a completion token go through the language-model head. Gradient flows through the
        entropy where `entropy_gradient` says so.
        """
        settings: dict[str, Any] = {"temperature": temperature, "entropy_gradient": entropy_gradient}
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_RL, "use_cache": False}
        if batch.segments is not None and batch.position_ids_RL is not None:
            inputs |= self._segmented.arguments(batch.position_ids_RL, batch.segments)
        if self._head.is_plain:
            hidden_RLD = self.model.base_model(**inputs).last_hidden_state
            hidden_ND = hidden_RLD.flatten(0, 1).index_select(0, batch.positions_N)
            head = self.model.get_output_embeddings()
            weights = Head(head.weight, head.bias, self._head.softcap)
            logprobs_N, entropy_N = head_logprobs_and_entropy(hidden_ND, weights, batch.targets_N, **settings)
        else:
            logits_RLV = self.model(**inputs).logits
            logits_NV = logits_RLV.flatten(0, 1).index_select(0, batch.positions_N)
            logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, batch.targets_N, **settings)
        shape = (batch.num_completions, batch.max_completion_tokens)
        index = (batch.rows_N, batch.columns_N)
        return TokenScores(
            logprobs_N.new_zeros(shape).index_put(index, logprobs_N),
            entropy_N.new_zeros(shape).index_put(index, entropy_N),
        )

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a folder that transformers alone loads: weights, config, tokenizer, generation config.

        Where the model has an adapter, that of PEFT: the weights of the adapter alone, their config, the tokenizer.

        Args:
            folder: Where to.
            weights: The whole weights by name, where the model does not hold them itself.
        """
        if is_adapted(self.model):
            save_adapter(self.model, folder, weights, self.base_checksum)
        else:
            with _without_progress_bar():
                self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """A run saves often, and has a display of its own."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
