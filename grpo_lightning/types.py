"""The domain's dictionary: what flows between the stages of an iteration.

Dimension legend, used as suffixes of tensor names in the whole package::

    P  prompts of one iteration on this rank     T  completion positions
    G  completions per prompt (the group)        L  sequence positions (prompt and completion)
    B  = P*G completions, prompt-major           N  tokens of a packed row
    V  vocabulary                                K  reward callbacks

Three log-probabilities of a sampled token are told apart everywhere and never share a name:

``sampler_logprobs``
    of the distribution that the rollout engine really drew from (mu);
``old_logprobs``
    of the trainer's policy at the start of the iteration's updates (pi_old);
``logprobs``
    of the policy now (pi_theta).
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_lightning.functional.segments import Segments

Message = Mapping[str, str]
"""One turn of a conversation: ``{"role": "user", "content": "2+2?"}``."""


class ConfigurationError(ValueError):
    """A mistake in what the user gave: a setting, a file, a reward function's return value.

    The command line prints its message, which names the YAML key, file or line and fits in three lines, without a
    traceback and exits with code 2. Everything else that is raised is a defect, and keeps its traceback.
    """


class Stream(enum.IntEnum):
    """What a random number is for. Numbers of different streams are independent, so that no use disturbs another."""

    TRAINING = 0
    """Tokens of training rollouts."""
    VALIDATION = 1
    """Tokens of `validate`, also in the middle of `fit`."""
    TEST = 2
    """Tokens of `test`."""
    PREDICT = 3
    """Tokens of `predict` and of `chat`."""
    PROMPT_ORDER = 4
    """The order of the prompts of an epoch."""
    DATA = 5
    """The content of generated data sets."""
    STATISTICS = 6
    """Resampling in statistics, for instance the subsets of maj@k."""


class FinishReason(enum.Enum):
    """Why a completion ended."""

    EOS = "eos"
    """The policy drew an end-of-sequence token (the last of `token_ids`, and a loss token)."""
    STOP = "stop"
    """The text reached one of the stop strings."""
    LENGTH = "length"
    """`max_new_tokens` was reached and the last token is no end of sequence: the completion is truncated."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a data set, ready to be completed.

    Example: ``Prompt(index=3, token_ids=(5, 9, 2), text="2+2=", columns={"answer": "4"})``
    """

    index: int
    """The row's number in its split: the prompt's identity, for retirement."""
    token_ids: tuple[int, ...]
    """The prompt as the policy reads it, chat template and generation prompt included."""
    text: str
    """The prompt as a person reads it: the plain text, or the last user turn of a conversation."""
    messages: tuple[Message, ...] | None = None
    """The conversation, where the data are conversational; then reward functions get messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns (``answer`` ...), handed to reward functions by name."""
    place: str | None = None
    """Where the row stands, for the messages of mistakes in it: ``train.jsonl:17``; None where that is not known."""


class Demonstration(NamedTuple):
    """A worked example for the cold start: what to read and what to write, in tokens."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """The tokens to imitate, end of sequence included."""


class EvaluationPrompt(NamedTuple):
    """A held-out prompt and its place in the held-out set, the slot of its random numbers."""

    slot: int
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """G completions of one prompt.

    Example: ``GenerationRequest(slot=17, token_ids=(5, 9, 2), num_completions=8)``
    """

    slot: int
    """The prompt's number within the iteration, over all ranks: the coordinate of its random numbers. A prompt drawn
    twice in an iteration has two slots, and so two different groups."""
    token_ids: tuple[int, ...]
    num_completions: int


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    Args:
        temperature: Divides the logits, > 0; 0 means greedy (evaluation only).
        max_new_tokens: Longest completion in tokens, end-of-sequence token included, >= 1.
        min_new_tokens: No end of sequence before this many tokens, in [0, max_new_tokens].
        top_k: Draw from the k likeliest tokens; None for all. Evaluation only.
        top_p: Draw from the smallest set of tokens whose probability reaches this, in (0, 1]. Evaluation only.
        stop: Strings that end a completion; the text keeps them.

    Raises:
        ConfigurationError: `min_new_tokens` is out of its range.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    top_k: int | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_new_tokens < 0 or self.min_new_tokens > self.max_new_tokens >= 1:
            raise ConfigurationError(
                f"model.sampling.min_new_tokens must be in [0, model.sampling.max_new_tokens = {self.max_new_tokens}], "
                f"got {self.min_new_tokens}."
            )


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where in a run a rollout stands. With slot, sample index and position they determine every random number."""

    seed: int
    stream: Stream
    iteration: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion.

    Example: ``Completion(token_ids=(7, 1), sampler_logprobs=(-0.2, -0.01), text="4",
    finish_reason=FinishReason.EOS, weight_version=12)``
    """

    token_ids: tuple[int, ...]
    """Every generated token, the end-of-sequence token included where one was drawn."""
    sampler_logprobs: tuple[float, ...]
    """One per token, natural logarithm, of the distribution really drawn from (temperature, top-k, top-p, suppressed
    end of sequence applied)."""
    text: str
    """The decoded tokens without special tokens."""
    finish_reason: FinishReason
    weight_version: int = 0
    """The number of optimizer steps behind the weights that drew it."""
    loss_mask: tuple[bool, ...] | None = None
    """False for tokens that the policy did not draw (tool output); None means all True."""

    @property
    def is_truncated(self) -> bool:
        """Whether the length limit cut it off."""
        return self.finish_reason is FinishReason.LENGTH


class StepScores(NamedTuple):
    """The scores of the steps of one completion, for process supervision (DeepSeekMath section 4.1.3).

    Example: two steps that end at tokens 3 and 9 of the completion: ``StepScores((1.0, 0.0), (3, 9))``.
    """

    scores: tuple[float, ...]
    end_positions: tuple[int, ...]
    """The completion position of each step's last token, increasing."""


Score = float | StepScores | None
"""What a reward says of one completion; None: this reward does not apply to it."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The groups that one rank sampled in one iteration: prompt p has completions p*G .. (p+1)*G - 1."""

    iteration: int
    slots: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]

    @property
    def group_size(self) -> int:
        """G, the number of completions per prompt."""
        return len(self.completions) // len(self.prompts) if self.prompts else 0

    @property
    def completion_prompts(self) -> tuple[Prompt, ...]:
        """The prompt of each completion, in the completions' order."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.group_size))

    @property
    def is_truncated_B(self) -> Tensor:
        """bool, the completions that the length limit cut off."""
        return torch.tensor([completion.is_truncated for completion in self.completions])


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """What the reward callbacks said of a rollout, one column each.

    Example, two completions and two rewards, of which the second failed on the second completion::

        names=("accuracy", "format"), weights=(1.0, 0.5),
        values_BK=[[1.0, 0.0], [0.0, nan]], failed_BK=[[False, False], [False, True]]
        totals_B=[1.0, nan], valid_B=[True, False]
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    values_BK: Tensor
    """float64; NaN where a reward does not apply or failed."""
    failed_BK: Tensor
    """bool; True where a reward raised, timed out, crashed or returned NaN."""
    steps: Mapping[str, Sequence[StepScores | None]] = field(default_factory=dict)
    """Per reward that returned step scores: those of each completion."""

    @property
    def valid_B(self) -> Tensor:
        """bool: no reward failed and at least one applies. The others take no part in the group's statistics."""
        return ~self.failed_BK.any(dim=1) & (~self.values_BK.isnan()).any(dim=1)

    @property
    def totals_B(self) -> Tensor:
        """float64: the weighted sum over the rewards that apply; NaN where not `valid_B`."""
        weights_K = self.values_BK.new_tensor(self.weights)
        totals_B = (self.values_BK.nan_to_num(0.0) * weights_K).sum(dim=1)
        return totals_B.masked_fill(~self.valid_B, float("nan"))


class Statistic(NamedTuple):
    """A mean that is still a sum and a count, so that it can be reduced exactly over any split."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple has a method of that name, which nobody asks a statistic for


class ForwardBatch(NamedTuple):
    """Completions laid out for one training forward: which tokens to feed, and where each loss token's score is.

    R is the number of rows of the forward, 1 where it is flat; N counts the completion tokens of the batch. The state
    at ``positions_N[n]`` predicts ``targets_N[n]``, whose score belongs to completion ``rows_N[n]``, position
    ``columns_N[n]``.
    """

    input_ids_RL: Tensor
    positions_N: Tensor
    """int64, indices into the flattened R*L positions."""
    targets_N: Tensor
    rows_N: Tensor
    columns_N: Tensor
    num_completions: int
    """B of this batch."""
    max_completion_tokens: int
    """T of this batch."""
    position_ids_RL: Tensor | None = None
    """int64, of each token in its own sequence; None where every row is one sequence."""
    segments: Segments | None = None
    """Who attends to whom in a flat row; None where every row is one sequence."""


class TokenScores(NamedTuple):
    """What the policy says of each completion token; 0 where a completion has no token."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    """Entropy in nats of the distribution that the token was drawn from."""


class LossOutput(NamedTuple):
    """The loss of some completions of a minibatch: a SUM already divided by the whole minibatch's global counts.

    Putting the outputs of any partition of a minibatch together gives the output of the whole: losses, parts and
    statistics add up, the lowest of the lowest is the lowest.
    """

    loss: Tensor
    statistics: Mapping[str, Statistic]
    parts: Mapping[str, Tensor] = MappingProxyType({})
    """By metric name, the loss and the terms that it is the sum of; without gradient."""
    lowest: Mapping[str, Tensor] = MappingProxyType({})
    """By metric name, the least value of any loss token or completion; infinity where there is none."""
    highest: Mapping[str, Tensor] = MappingProxyType({})
    """The greatest value; minus infinity where there is none."""
    values: Mapping[str, Tensor] = MappingProxyType({})
    """By metric name, what the quantiles are of: one axis, NaN where there is no loss token."""


class MinibatchCounts(NamedTuple):
    """What a minibatch counts over all ranks, fixed before its first backward: the denominators of the loss."""

    tokens: int
    """Loss tokens."""
    sequences: int
    """Completions with at least one loss token."""
    groups: int
    """Groups with at least one loss token."""


class LossBatch(NamedTuple):
    """Some completions of a minibatch, as the objective sees them; 0 where a completion has no token."""

    advantages_BT: Tensor
    """Shape [B, 1] where the tokens of a completion have one advantage."""
    mask_BT: Tensor
    """bool, the loss tokens."""
    group_tokens_B: Tensor
    """int64, the loss tokens of the group that each completion belongs to."""
    old_logprobs_BT: Tensor | None = None
    """None on the only update of an iteration: then old and current are the same."""
    reference_logprobs_BT: Tensor | None = None
    """None where nothing needs a reference."""
    sampler_logprobs_BT: Tensor | None = None
    """float64; None where the engine gave none."""
    policy_mask_BT: Tensor | None = None
    """bool, the tokens that keep their policy gradient; None for all."""


class Coefficients(NamedTuple):
    """The strengths of the regularisers at this moment of the run. Callbacks may move them between updates."""

    kl: float
    entropy: float


@dataclass(frozen=True, kw_only=True)
class ScoredGroups:
    """The scored groups of an iteration, of one rank or of all: what advantages are computed from.

    Example, two prompts with two completions each and one reward, of which the last completion is not learned from::

        slots_P=[0, 3], rewards_PG=[[1.0, 0.0], [0.0, nan]], valid_PG=[[True, True], [True, False]],
        values_PGK=[[[1.0], [0.0]], [[0.0], [nan]]], weights_K=[1.0], lengths_PG=[[12, 7], [9, 30]]
    """

    slots_P: Tensor
    """int64, rising: the prompt's number within the iteration, over all ranks."""
    rewards_PG: Tensor
    """float64, the weighted totals; where not valid it may be anything."""
    valid_PG: Tensor
    """bool: the completions that take part in the statistics."""
    values_PGK: Tensor
    """float64, what each reward said; NaN where it does not apply."""
    weights_K: Tensor
    """float64, of the rewards."""
    lengths_PG: Tensor
    """int64, the loss tokens."""

    def kept_by(self, keep: Callable[[Tensor, Tensor], Tensor]) -> "ScoredGroups":
        """The same, with the completions of the groups that `keep` leaves out not valid.

        Args:
            keep: From rewards_PG and valid_PG to a bool per group.
        """
        return replace(self, valid_PG=self.valid_PG & keep(self.rewards_PG, self.valid_PG)[:, None])


class CompletionTokens(NamedTuple):
    """The tokens of one rank's completions before the first update, for advantages that differ from token to token."""

    mask_BT: Tensor
    """bool, the loss tokens of valid completions."""
    step_scores_BT: Tensor
    """float64, the score of a step at its last token, 0 elsewhere."""
    is_step_BT: Tensor
    """bool, where a step ends."""
    old_logprobs_BT: Tensor | None
    reference_logprobs_BT: Tensor | None
