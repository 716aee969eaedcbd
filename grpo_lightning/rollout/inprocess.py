"""Rollouts on the policy's own weights: nothing to synchronise, and the sampler's log-probs are the trainer's."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.rollout.attention import AttentionPattern
from grpo_lightning.rollout.cache import RowCache
from grpo_lightning.rollout.decoding import Decoding, Drawn
from grpo_lightning.rollout.engine import Gathering, RolloutEngine
from grpo_lightning.rollout.finish import FinishRules
from grpo_lightning.rollout.lengths import check_lengths
from grpo_lightning.rollout.prefix import SharingCache
from grpo_lightning.rollout.sharing import can_share, tokens_saved
from grpo_lightning.types import (
    Completion,
    ConfigurationError,
    Coordinates,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)


class InProcessEngine(RolloutEngine):
    """Decodes with a key-value cache on the model's own weights.

    Works for any causal language model of transformers with full or sliding-window attention. Each distinct prompt is
    read once. Where its group would hold many copies of its keys and values, all read a single one; else each row gets
    its own. Rows that have finished leave the batch and waiting ones enter, so that ragged lengths cost what they
    weigh.

    In fp32, whose sums depend on the batch's shape in their last bits, what else is in the batch changed 7 of 1,635,402
    tokens, or 4.3e-6 ± 2e-6 of them: from none of 408,695 for random weights of deviation 0.02 to 1.5e-5 ± 6e-6 for ten
    times larger ones (``tools/measure_token_flips.py --num-tokens 400000``, CPU). In fp64, none of 128,153.

    Args:
        max_rows: Most completions decoded at once, which bounds the cache's memory; None for all.
        share_prompts_from: Copies of prompts are shared where that saves each completion at least so many tokens' keys
            and values on average, and the model's attention allows it; None for never.
        gather: Under fsdp2 and deepspeed_3, what of the weights is whole while completions are drawn. "whole": all, put
            together once per rollout. "layerwise": what is around the layers, and one layer after the other, at every
            token; the ranks draw in step. For models that do not fit a device as a whole.
    """

    def __init__(
        self, max_rows: int | None = 256, share_prompts_from: int | None = 16, gather: Gathering = "whole"
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ConfigurationError(f"model.engine.max_rows must be >= 1 or null, got {max_rows}.")
        if share_prompts_from is not None and share_prompts_from < 0:
            raise ConfigurationError(f"model.engine.share_prompts_from must be >= 0 or null, got {share_prompts_from}.")
        if gather not in get_args(Gathering):
            raise ConfigurationError(f"model.engine.gather must be one of {get_args(Gathering)}, got {gather!r}.")
        self.gather = gather
        self.max_rows = max_rows
        self.share_prompts_from = share_prompts_from
        self.version = 0
        self._cache = RowCache()
        self._can_share: bool | None = None
        """Whether the model can share prompts; None where it has not been asked."""
        self._rules: tuple[tuple[str, ...], FinishRules] | None = None

    @property
    def draws_alone(self) -> bool:
        """Where no weights are put together on the way."""
        return self.gather == "whole"

    def setup(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        """Attach the policy whose completions are wanted.

        Raises:
            ConfigurationError: The model's layers are not all attention over cached keys and values.
        """
        self._pattern = AttentionPattern.of(model.config.get_text_config())
        self._model, self._tokenizer, self._eos_token_ids = model, tokenizer, eos_token_ids
        self._rules = self._can_share = None

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:  # noqa: ARG002 - shared
        """Note the version: the weights are the policy's own."""
        self.version = version

    def close(self) -> None:
        """Free the cache."""
        self._cache = RowCache()

    # Not inference_mode: the tensors of a rollout may be saved for the backward of the update.
    @torch.no_grad()
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request.

        Raises:
            ConfigurationError: A prompt and `max_new_tokens` exceed the model's positions, or a prompt is empty.
            FloatingPointError: The policy's logits are not finite.
        """
        check_lengths(requests, sampling, self._model.config)
        rules = self._finish_rules(sampling)
        # Copies of all weights in another precision would be as large as they are.
        cast = nullcontext() if self.gather == "layerwise" else _weights_cast_once(self._model.device.type)
        with _decoding(self._model), cast:
            kind = SharingCache if self._shares(requests, sampling) else RowCache
            if type(self._cache) is not kind:
                self._cache = kind()
            decoding = Decoding(self._model, self._cache, self._pattern, rules, sampling, coordinates)
            drawn = decoding.run(requests, max_rows=self.max_rows or sum(r.num_completions for r in requests))
        if self._model.device.type != "cpu":
            # The memory is wanted for the update, and quick to get again; on a CPU it is the other way round.
            self._cache = RowCache()
        return self._completions(drawn)

    def _shares(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> bool:
        """Whether prompts are held once for all their completions."""
        if self.share_prompts_from is None or tokens_saved(requests) < self.share_prompts_from:
            return False
        longest = max((len(request.token_ids) for request in requests), default=0) + sampling.max_new_tokens
        if self._pattern.window is not None and self._pattern.window < longest:
            # Each row would see another part of the prompt.
            return False
        if self._can_share is None:
            self._can_share = can_share(self._model, self._pattern)
        return self._can_share

    def _completions(self, drawn: Drawn) -> list[Completion]:
        if any(math.isnan(logprob) for logprobs in drawn.logprobs for logprob in logprobs):
            self._cache = RowCache()
            raise FloatingPointError("The policy's logits are not finite: its weights have diverged.")
        texts = self._tokenizer.batch_decode(drawn.token_ids, skip_special_tokens=True) if drawn.token_ids else []
        return [
            Completion(
                token_ids=tuple(token_ids),
                sampler_logprobs=tuple(logprobs),
                text=text,
                finish_reason=self._finish_reason(token_ids[-1], is_stopped),
                weight_version=self.version,
            )
            for token_ids, logprobs, is_stopped, text in zip(
                drawn.token_ids, drawn.logprobs, drawn.is_stopped, texts, strict=True
            )
        ]

    def _finish_reason(self, last_token: int, is_stopped: bool) -> FinishReason:
        if last_token in self._eos_token_ids:
            return FinishReason.EOS
        return FinishReason.STOP if is_stopped else FinishReason.LENGTH

    def _finish_rules(self, sampling: SamplingParams) -> FinishRules:
        """The rules, kept between calls: looking for stop strings reads the whole vocabulary."""
        if self._rules is None or self._rules[0] != sampling.stop:
            head = self._model.get_output_embeddings()
            config = self._model.config.get_text_config()
            rules = FinishRules(
                self._tokenizer,
                self._eos_token_ids,
                sampling,
                vocabulary=config.vocab_size if head is None else head.weight.shape[0],
                device=self._model.device,
            )
            self._rules = sampling.stop, rules
        return self._rules[1]


@contextmanager
def _decoding(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and an attention that takes masks; both as before afterwards."""
    training, attention = [module for module in model.modules() if module.training], model.config._attn_implementation
    model.eval()
    if attention not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if attention not in ("eager", "sdpa"):
            model.set_attn_implementation(attention)


@contextmanager
def _weights_cast_once(device: str) -> Iterator[None]:
    """Under autocast, cast each trained weight once for all steps: Lightning's autocast casts it at every use.

    Frozen weights are still cast at every use: torch keeps no copies of these.
    """
    if not torch.is_autocast_enabled(device):
        yield
        return
    torch.clear_autocast_cache()  # an outer autocast may have copies from before the last update
    with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=True):
        try:
            yield
        finally:
            # Leaving an inner autocast keeps what it has cast, and the next update changes the weights.
            torch.clear_autocast_cache()
