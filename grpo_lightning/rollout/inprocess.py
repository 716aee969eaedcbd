"""Rollouts on the policy's own weights: nothing to synchronise, and the sampler's log-probabilities are the trainer's."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.functional.random import uniforms
from grpo_lightning.rollout.cache import RowCache, additive, prefill
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.sampling import draw, sampling_logprobs
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

    Each distinct prompt is run through the model once and its cache copied to the rows of its group. Rows that have
    finished leave the batch and waiting ones take their places, so that ragged lengths cost what they weigh.

    Args:
        max_rows: Completions decoded at once, which bounds the cache's memory; None for all.
    """

    def __init__(self, max_rows: int | None = None) -> None:
        if max_rows is not None and max_rows < 1:
            raise ConfigurationError(f"model.engine.max_rows must be >= 1 or null, got {max_rows}.")
        self.max_rows = max_rows
        self.version = 0

    def setup(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]
    ) -> None:
        """Attach the policy."""
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:  # noqa: ARG002 - shared
        """Note the version: the weights are the policy's own."""
        self.version = version

    @torch.no_grad()
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request."""
        rows = [
            _Row(request=i, sample=sample, slot=request.slot, prompt=request.token_ids)
            for i, request in enumerate(requests)
            for sample in range(request.num_completions)
        ]
        if not rows:
            return []
        self._check_length(max(len(row.prompt) for row in rows), sampling)
        was_training = self.model.training
        self.model.eval()
        try:
            completions = _Decoding(self, sampling, coordinates, rows).run()
        finally:
            self.model.train(was_training)
        return completions

    def _check_length(self, longest_prompt: int, sampling: SamplingParams) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest_prompt + sampling.max_new_tokens > limit:
            raise ConfigurationError(
                f"model.sampling.max_new_tokens: a prompt of {longest_prompt} tokens and {sampling.max_new_tokens} new "
                f"ones exceed the {limit} positions of the model."
            )


@dataclass(frozen=True, slots=True)
class _Row:
    request: int
    sample: int
    slot: int
    prompt: tuple[int, ...]


class _Decoding:
    """One call of `generate`: the rows alive, those waiting, and what has been drawn."""

    def __init__(
        self, engine: InProcessEngine, sampling: SamplingParams, coordinates: Coordinates, rows: list[_Row]
    ) -> None:
        self.engine, self.sampling, self.coordinates = engine, sampling, coordinates
        parameter = next(engine.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.order = rows
        self.done: dict[_Row, Completion] = {}
        num_rows = min(engine.max_rows or len(rows), len(rows))
        longest = max(len(row.prompt) for row in rows)
        spare = sampling.max_new_tokens if num_rows < len(rows) else 0
        self.cache = RowCache(longest + sampling.max_new_tokens + spare)
        self.cache.end = longest
        self.eos = torch.tensor(sorted(engine.eos_token_ids), device=self.device)
        self.waiting = deque(rows)
        self.rows: list[_Row] = []
        self._admit([self.waiting.popleft() for _ in range(num_rows)], places=None)

    def run(self) -> list[Completion]:
        """Decode until nothing is alive or waiting."""
        while True:
            is_finished_R = self._draw()
            if bool(is_finished_R.any()):
                self._retire(is_finished_R)
            if not self.rows:
                return [self.done[row] for row in self.order]
            self._forward()

    def _admit(self, rows: list[_Row], places: Tensor | None) -> None:
        """Prefill the rows' distinct prompts and give the rows their places."""
        distinct = list(dict.fromkeys(row.prompt for row in rows))
        layers, logits_UV = prefill(self.engine.model, distinct, self.device)
        index = {prompt: i for i, prompt in enumerate(distinct)}
        prompt_of_row = torch.tensor([index[row.prompt] for row in rows], device=self.device)
        self.cache.admit(layers, prompt_of_row, places)
        admitted = {
            "logits_RV": logits_UV[prompt_of_row],
            "starts_R": torch.tensor([self.cache.end - len(row.prompt) for row in rows], device=self.device),
            "counts_R": torch.zeros(len(rows), dtype=torch.long, device=self.device),
            "uniforms_RT": self._uniforms(rows),
            "tokens_RT": torch.zeros(len(rows), self.sampling.max_new_tokens, dtype=torch.long, device=self.device),
            "logprobs_RT": torch.zeros(
                len(rows), self.sampling.max_new_tokens, dtype=torch.float64, device=self.device
            ),
        }
        if places is None:
            self.rows, self.state = rows, admitted
            self.is_live_R = torch.ones(len(rows), dtype=torch.bool, device=self.device)
            return
        for row, place in zip(rows, places.tolist(), strict=True):
            self.rows[place] = row
        for name, values in admitted.items():
            self.state[name][places] = values.to(self.state[name].dtype)
        self.is_live_R[places] = True

    def _uniforms(self, rows: list[_Row]) -> Tensor:
        return uniforms(
            seed=self.coordinates.seed,
            stream=self.coordinates.stream,
            iteration=self.coordinates.iteration,
            slots=torch.tensor([row.slot for row in rows], device=self.device)[:, None],
            samples=torch.tensor([row.sample for row in rows], device=self.device)[:, None],
            positions=torch.arange(self.sampling.max_new_tokens, device=self.device)[None],
        )

    def _draw(self) -> Tensor:
        """Draw the next token of every row; returns which rows have finished with it."""
        logits_RV, counts_R1 = self.state["logits_RV"], self.state["counts_R"][:, None]
        if self.sampling.min_new_tokens:
            is_early_R1 = counts_R1 < self.sampling.min_new_tokens
            is_eos_V = torch.zeros(logits_RV.shape[1], dtype=torch.bool, device=self.device)
            is_eos_V[self.eos] = True
            logits_RV = logits_RV.masked_fill(is_early_R1 & is_eos_V[None], -math.inf)
        logprobs_RV = sampling_logprobs(logits_RV, self.sampling)
        # Rows that have finished and wait to be taken out go on drawing into their last column, unread.
        column_R1 = counts_R1.clamp(max=self.sampling.max_new_tokens - 1)
        if self.sampling.temperature == 0:
            tokens_R = logprobs_RV.argmax(dim=1)
        else:
            tokens_R = draw(logprobs_RV, self.state["uniforms_RT"].gather(1, column_R1).squeeze(1))
        logprobs_R1 = logprobs_RV.gather(1, tokens_R[:, None]).double()
        live_R1 = self.is_live_R[:, None]
        for name, values_R1 in (("tokens_RT", tokens_R[:, None]), ("logprobs_RT", logprobs_R1)):
            store_RT = self.state[name]
            store_RT.scatter_(1, column_R1, torch.where(live_R1, values_R1, store_RT.gather(1, column_R1)))
        self.tokens_R = tokens_R
        self.state["counts_R"] = self.state["counts_R"] + self.is_live_R
        is_finished_R = torch.isin(tokens_R, self.eos) | (self.state["counts_R"] >= self.sampling.max_new_tokens)
        if self.sampling.stop:
            is_finished_R = is_finished_R | self._reached_stop()
        return is_finished_R & self.is_live_R

    def _reached_stop(self) -> Tensor:
        return torch.tensor([self._stops(self._text(place)) for place in range(len(self.rows))], device=self.device)

    def _stops(self, text: str) -> bool:
        return any(stop in text for stop in self.sampling.stop)

    def _text(self, place: int) -> str:
        token_ids = self.state["tokens_RT"][place, : int(self.state["counts_R"][place])]
        return str(self.engine.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _retire(self, is_finished_R: Tensor) -> None:
        """Note the completions that have finished; let waiting rows in, or close the gaps, once it pays."""
        places = is_finished_R.nonzero().squeeze(1)
        tokens, logprobs = self.state["tokens_RT"][places].tolist(), self.state["logprobs_RT"][places].tolist()
        counts = self.state["counts_R"][places].tolist()
        texts = self.engine.tokenizer.batch_decode(
            [row[:count] for row, count in zip(tokens, counts, strict=True)], skip_special_tokens=True
        )
        for place, row, scores, count, text in zip(places.tolist(), tokens, logprobs, counts, texts, strict=True):
            self.done[self.rows[place]] = Completion(
                token_ids=tuple(row[:count]),
                sampler_logprobs=tuple(scores[:count]),
                text=text,
                finish_reason=self._reason(row[count - 1], text),
                weight_version=self.engine.version,
            )
        self.is_live_R = self.is_live_R & ~is_finished_R
        num_live, num_rows = int(self.is_live_R.sum()), len(self.rows)
        is_worth_it = num_live <= 0.75 * num_rows
        if self.waiting and (is_worth_it or num_rows == 1):
            self._refill()
        elif num_live == 0 and not self.waiting:
            self.rows = []
        elif is_worth_it and not self.waiting:
            self._compact()

    def _reason(self, last_token: int, text: str) -> FinishReason:
        if last_token in self.engine.eos_token_ids:
            return FinishReason.EOS
        return FinishReason.STOP if self._stops(text) else FinishReason.LENGTH

    def _refill(self) -> None:
        places = (~self.is_live_R).nonzero().squeeze(1)[: len(self.waiting)]
        if bool(self.is_live_R.any()):
            self._make_room(1)
        self._admit([self.waiting.popleft() for _ in range(len(places))], places)
        # A row that is not the longest may have left a gap in front; the window starts at the first live column.
        if not self.waiting and bool((~self.is_live_R).any()):
            self._compact()

    def _compact(self) -> None:
        places = self.is_live_R.nonzero().squeeze(1)
        self.cache.start = int(self.state["starts_R"][places].min())
        self.cache.keep(places)
        self.rows = [self.rows[place] for place in places.tolist()]
        self.state = {name: values[places] for name, values in self.state.items()}
        self.tokens_R, self.is_live_R = self.tokens_R[places], self.is_live_R[places]

    def _make_room(self, columns: int) -> None:
        """Move the window to the front of the buffer where the next columns would not fit."""
        if self.cache.end + columns <= self.cache.capacity:
            return
        live_starts_R = self.state["starts_R"].masked_fill(~self.is_live_R, self.cache.end)
        # The longest waiting prompt must fit before the next column, so the window keeps at least its width.
        longest = max((len(row.prompt) for row in self.waiting), default=0)
        self.cache.start = min(int(live_starts_R.min()), self.cache.end - longest)
        moved = self.cache.start
        self.cache.move_to_front()
        self.state["starts_R"] = (self.state["starts_R"] - moved).clamp(min=0)

    def _forward(self) -> None:
        """Feed the tokens just drawn. Rows admitted since the draw have fed nothing yet and keep their logits."""
        self._make_room(1)
        is_fresh_R1 = (self.state["counts_R"] == 0)[:, None]
        columns_L = torch.arange(self.cache.start, self.cache.end + 1, device=self.device)
        is_visible_RL = columns_L[None] >= self.state["starts_R"][:, None]
        output = self.engine.model(
            input_ids=self.tokens_R[:, None],
            attention_mask=additive(is_visible_RL[:, None, None], self.dtype),
            position_ids=(self.cache.end - self.state["starts_R"])[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.end += 1
        self.state["logits_RV"] = torch.where(is_fresh_R1, self.state["logits_RV"], output.logits[:, -1])
        if bool(is_fresh_R1.any()):
            self._skip_column(is_fresh_R1.squeeze(1))

    def _skip_column(self, is_fresh_R: Tensor) -> None:
        """Move the prompts of fresh rows one column on, over the column that their neighbours have just written."""
        rows = is_fresh_R.nonzero().squeeze(1)
        for buffer in (*self.cache.keys, *self.cache.values):
            buffer[rows, :, 1 : self.cache.end] = buffer[rows, :, : self.cache.end - 1].clone()
        self.state["starts_R"] = self.state["starts_R"] + is_fresh_R
