"""One call of `generate`: the completions being drawn, those waiting, and what has been drawn."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_lightning.functional.random import uniforms
from grpo_lightning.rollout.attention import AttentionPattern
from grpo_lightning.rollout.cache import RowCache
from grpo_lightning.rollout.finish import FinishRules
from grpo_lightning.rollout.prefill import PromptStates, chunks, prefill
from grpo_lightning.rollout.sampling import Draw, sample, suppress_
from grpo_lightning.types import Coordinates, GenerationRequest, SamplingParams

_STEPS_PER_BLOCK = 32
_REFILL_SHARE = 16


@dataclass(slots=True)
class Row:
    """A completion being drawn."""

    completion: int
    """Its number in the call's order."""
    slot: int
    sample: int
    born: int = 0
    """The step that drew its first token."""
    token_ids: list[int] = field(default_factory=list)
    """What it has drawn; kept only where there are stop strings to look for."""


@dataclass(slots=True)
class _Group:
    """The completions of one distinct prompt that still wait."""

    name: int
    prompt: tuple[int, ...]
    rows: deque[Row]
    states: PromptStates | None = None
    index: int = 0
    """The prompt's place in `states`."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a call drew, by completion."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    is_stopped: list[bool]
    """Whether a stop string ended the completion."""


def next_logits(
    model: PreTrainedModel, cache: RowCache, pattern: AttentionPattern, tokens_R: Tensor, positions_R: Tensor
) -> Tensor:
    """Feed every live row of a cache a token.

    Args:
        model: The policy.
        cache: Of the rows; goes on to its next column.
        pattern: The model's attention layers.
        tokens_R: The rows' tokens.
        positions_R: Where in its sequence each of them is.

    Returns:
        The logits after it, [R, V].
    """
    with cache.reading(model) as arguments:
        output = model(
            input_ids=tokens_R[:, None],
            position_ids=positions_R[:, None],
            attention_mask=cache.masks(pattern),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
    cache.advance()
    logits: Tensor = output.logits[:, -1]
    return logits


class Decoding:
    """Draws completions, at most `max_rows` at a time.

    Each turn of the loop lets waiting rows in where enough places are free (their first tokens are drawn from their
    prompts' logits), feeds every live row its last token, draws the next ones, and lets finished rows go. The host
    sees, once per turn, which rows drew a token that may end a completion; it keeps no other count.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RowCache,
        pattern: AttentionPattern,
        rules: FinishRules,
        sampling: SamplingParams,
        coordinates: Coordinates,
    ) -> None:
        self._model, self._cache, self._pattern, self._rules = model, cache, pattern, rules
        self._sampling, self._coordinates = sampling, coordinates
        self._step = 0
        self._rows: list[Row] = []
        self._waiting: deque[_Group] = deque()
        self._stopped: set[int] = set()
        self._history: list[tuple[Tensor, Draw]] = []
        device = model.device
        self._numbers = torch.empty(0, dtype=torch.long)
        """Completion number of each live row, on the CPU."""
        self._tokens_R = torch.empty(0, dtype=torch.long, device=device)
        self._positions_R = torch.empty(0, dtype=torch.long, device=device)
        """Where in its sequence each row's last token is."""
        self._births_R = torch.empty(0, dtype=torch.long, device=device)
        """The step that drew each row's first token."""
        self._uniforms_RS = torch.empty(0, _STEPS_PER_BLOCK + 1, dtype=torch.float64, device=device)
        """Column s is what step `_block` + s draws with."""
        self._block = 0
        self._oldest = 0
        """The earliest birth among the live rows."""

    def run(self, requests: Sequence[GenerationRequest], *, max_rows: int) -> Drawn:
        """Draw all completions of the requests."""
        num_completions = self._queue(requests)
        if not num_completions:
            return Drawn(token_ids=[], logprobs=[], is_stopped=[])
        max_rows = min(max_rows, num_completions)
        self._cache.begin(num_rows=max_rows, longest_prompt=len(self._waiting[-1].prompt))
        # A few places at a time: letting a row in costs about as much on its own as in company.
        refill = -(-max_rows // _REFILL_SHARE)
        while self._waiting or self._rows:
            free = max_rows - len(self._rows)
            if self._waiting and (free >= refill or not self._rows):
                self._admit(free)
            if self._rows:
                self._decode()
        return self._drawn(num_completions)

    def _queue(self, requests: Sequence[GenerationRequest]) -> int:
        """Sort the completions by prompt, the shortest first."""
        groups: dict[tuple[int, ...], deque[Row]] = {}
        number = 0
        for request in requests:
            rows = groups.setdefault(request.token_ids, deque())
            for index in range(request.num_completions):
                rows.append(Row(completion=number, slot=request.slot, sample=index))
                number += 1
        ordered = sorted((prompt for prompt, rows in groups.items() if rows), key=len)
        self._waiting = deque(_Group(name, prompt, groups[prompt]) for name, prompt in enumerate(ordered))
        return number

    def _admit(self, num_rows: int) -> None:
        """Let so many waiting rows in, reading their prompts first where that has not been done."""
        entering: list[tuple[_Group, list[Row]]] = []
        while num_rows and self._waiting:
            group = self._waiting[0]
            rows = [group.rows.popleft() for _ in range(min(num_rows, len(group.rows)))]
            entering.append((group, rows))
            num_rows -= len(rows)
            if not group.rows:
                self._waiting.popleft()
        if entering[0][0].states is not None:
            self._enter(entering[0][0].states, entering[:1])
            entering = entering[1:]
        for part in chunks([len(group.prompt) for group, _ in entering]):
            together = entering[part]
            states = prefill(self._model, [group.prompt for group, _ in together], self._pattern)
            for index, (group, _) in enumerate(together):
                group.index = index
            self._enter(states, together)
            last = together[-1][0]
            if last.rows:
                last.states, last.index = states.select(last.index), 0

    def _enter(self, states: PromptStates, together: list[tuple[_Group, list[Row]]]) -> None:
        """Make rows live and draw their first tokens."""
        rows = [row for _, rows in together for row in rows]
        prompts = [group.index for group, rows in together for _ in rows]
        lengths = [len(group.prompt) for group, rows in together for _ in rows]
        for row in rows:
            row.born = self._step
        self._cache.append(states, prompts, lengths, [group.name for group, rows in together for _ in rows])
        logits_RV = states.logits_UV.index_select(0, torch.tensor(prompts, device=self._tokens_R.device))
        uniforms_RS = self._uniforms(rows)
        births_R = torch.full((len(rows),), self._step, device=self._tokens_R.device)
        drawn = self._sample(logits_RV, uniforms_RS[:, self._step - self._block], births_R)
        numbers = torch.tensor([row.completion for row in rows])
        self._history.append((numbers, drawn))
        num_old = len(self._rows)
        self._rows += rows
        self._oldest = min(self._oldest, self._step)
        self._numbers = torch.cat((self._numbers, numbers))
        self._tokens_R = torch.cat((self._tokens_R, drawn.tokens_R))
        self._positions_R = torch.cat((self._positions_R, torch.tensor(lengths, device=self._tokens_R.device) - 1))
        self._births_R = torch.cat((self._births_R, births_R))
        self._uniforms_RS = torch.cat((self._uniforms_RS, uniforms_RS))
        self._let_go(drawn.tokens_R, first=num_old)

    def _decode(self) -> None:
        """Feed every live row its last token and draw the next."""
        if self._step - self._block == _STEPS_PER_BLOCK:
            self._block = self._step
            self._uniforms_RS = self._uniforms(self._rows)
        self._positions_R += 1
        self._step += 1
        logits_RV = next_logits(self._model, self._cache, self._pattern, self._tokens_R, self._positions_R)
        drawn = self._sample(logits_RV, self._uniforms_RS[:, self._step - self._block], self._births_R)
        self._history.append((self._numbers, drawn))
        self._tokens_R = drawn.tokens_R
        self._let_go(drawn.tokens_R, first=0)

    def _sample(self, logits_RV: Tensor, uniforms_R: Tensor, births_R: Tensor) -> Draw:
        """Draw each row's next token; the logits are written to."""
        minimum = self._sampling.min_new_tokens
        if minimum:
            suppress_(logits_RV, self._rules.eos_E, self._step - births_R < minimum)
        return sample(logits_RV, uniforms_R, self._sampling)

    def _uniforms(self, rows: list[Row]) -> Tensor:
        """The random numbers of the rows for this block of steps; those before a row's birth are never looked at."""
        slots, samples, born = torch.tensor([(row.slot, row.sample, row.born) for row in rows]).T[..., None]
        device = self._tokens_R.device
        return uniforms(
            seed=self._coordinates.seed,
            stream=self._coordinates.stream,
            iteration=self._coordinates.iteration,
            slots=slots.to(device),
            samples=samples.to(device),
            positions=(torch.arange(self._block, self._block + _STEPS_PER_BLOCK + 1)[None] - born).to(device),
        )

    def _let_go(self, tokens_R: Tensor, *, first: int) -> None:
        """Take out the rows, from `first` on, that have finished with the tokens just drawn."""
        finished = self._ended(tokens_R, first)
        last_birth = self._step + 1 - self._sampling.max_new_tokens
        if self._oldest <= last_birth:
            finished += [i for i, row in enumerate(self._rows) if row.born <= last_birth and i not in set(finished)]
        if not finished:
            return
        order = self._cache.remove(finished)
        self._rows = [self._rows[row] for row in order]
        self._oldest = min((row.born for row in self._rows), default=self._step + 1)
        kept = torch.tensor(order, dtype=torch.long)
        self._numbers = self._numbers[kept]
        kept = kept.to(tokens_R.device)
        self._tokens_R, self._positions_R = self._tokens_R[kept], self._positions_R[kept]
        self._births_R, self._uniforms_RS = self._births_R[kept], self._uniforms_RS[kept]

    def _ended(self, tokens_R: Tensor, first: int) -> list[int]:
        """The rows that an end of sequence or a stop string ended."""
        suspects = self._rules.may_end_V[tokens_R].nonzero().flatten().tolist()
        if not self._sampling.stop:
            return [first + i for i in suspects]
        tokens = tokens_R.tolist()
        for row, token in zip(self._rows[first:], tokens, strict=True):
            row.token_ids.append(token)
        ended = []
        for i in suspects:
            row = self._rows[first + i]
            if tokens[i] not in self._rules.eos_token_ids:
                if not self._rules.reaches_stop(row.token_ids):
                    continue
                self._stopped.add(row.completion)
            ended.append(first + i)
        return ended

    def _drawn(self, num_completions: int) -> Drawn:
        """Sort what the steps drew by completion; each one's tokens are in their order already."""
        numbers = torch.cat([numbers for numbers, _ in self._history])
        order = numbers.argsort(stable=True)
        counts = numbers.bincount(minlength=num_completions).tolist()
        tokens = torch.cat([draw.tokens_R for _, draw in self._history]).cpu()[order]
        logprobs = torch.cat([draw.logprobs_R for _, draw in self._history]).cpu()[order]
        return Drawn(
            token_ids=[part.tolist() for part in tokens.split(counts)],
            logprobs=[part.tolist() for part in logprobs.split(counts)],
            is_stopped=[number in self._stopped for number in range(num_completions)],
        )
