"""Expectations without sampling: a policy so small that every group it can draw is enumerated.

The axes here: S states of the policy, V = 3 tokens of which 0 ends a completion, Y completions that exist, and of a
group size G the P = Y^G groups that can be drawn, in order. Everything is float64.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_lightning.functional.logprobs import logprobs_and_entropy
from grpo_lightning.objective import Objective
from grpo_lightning.types import Coefficients, CompletionTokens, LossBatch, MinibatchCounts, ScoredGroups, TokenScores


@dataclass(frozen=True, kw_only=True)
class Space:
    """The completions that exist: their tokens, the state that each token is drawn in, and which tokens exist."""

    num_states: int
    tokens_YT: Tensor
    states_YT: Tensor
    mask_YT: Tensor

    def policy(self, seed: int, *, spread: float = 0.8) -> Tensor:
        """Random logits, [S, V]: a policy."""
        generator = torch.Generator().manual_seed(seed)
        return spread * torch.randn(self.num_states, 3, dtype=torch.float64, generator=generator)

    def scores(self, logits_SV: Tensor) -> TokenScores:
        """Log-probabilities and entropies of all completions' tokens, [Y, T]; 0 where there is none."""
        of_token = logprobs_and_entropy(
            logits_SV[self.states_YT.flatten()], self.tokens_YT.flatten(), temperature=1.0, entropy_gradient=True
        )
        return TokenScores(*(part.view_as(self.tokens_YT).masked_fill(~self.mask_YT, 0.0) for part in of_token))

    def probabilities(self, logits_SV: Tensor) -> Tensor:
        """pi(y), [Y]."""
        return self.scores(logits_SV).logprobs_BT.sum(dim=1).exp()

    def gradient_of_mean(self, logits_SV: Tensor, values_Y: Tensor) -> Tensor:
        """The gradient of sum_y pi(y) v(y), by differentiating the probabilities: no score function, no sampling."""
        return gradient(lambda leaf: (self.probabilities(leaf) * values_Y).sum(), logits_SV)

    def groups(self, group_size: int) -> Tensor:
        """Every group of completions, [P, G]."""
        num_completions = len(self.tokens_YT)
        return torch.tensor(list(itertools.product(range(num_completions), repeat=group_size)))


SEQUENCES = Space(
    num_states=3,  # at the start, and after the token 1 or 2
    tokens_YT=torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]),
    states_YT=torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2]]),
    mask_YT=torch.tensor([[1, 0], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1]], dtype=torch.bool),
)
"""At most two tokens: seven completions, of which the first has one token."""

BANDIT = Space(
    num_states=1,
    tokens_YT=torch.tensor([[0], [1], [2]]),
    states_YT=torch.tensor([[0], [0], [0]]),
    mask_YT=torch.ones(3, 1, dtype=torch.bool),
)
"""One token: what is said of a token is said of the whole completion."""

GRADED = torch.tensor([0.3, 1.0, -0.5, 0.7, 0.0, 1.4, -1.1], dtype=torch.float64)
"""A reward of each of the seven completions."""
BINARY = torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.float64)
"""Another: right or wrong."""


def gradient(function, logits_SV: Tensor) -> Tensor:
    """By autograd."""
    leaf = logits_SV.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The expected update of an objective: every group is a minibatch by itself, weighed by its probability.

    Args:
        space: The completions that exist.
        policy: Logits of pi_theta, [S, V].
        rewards: Of each completion, [Y], or of each completion of each group, [P, G].
        group_size: G.
        old: Logits of pi_old; None where it is pi_theta.
        sampler: Logits of mu, which draws the groups; None where it is pi_old.
        reference: Logits of pi_ref.
        keep: Given rewards and validity, [P, G], the groups to draw from; None for all.
    """

    policy: Tensor
    rewards: Tensor
    group_size: int
    space: Space = SEQUENCES
    old: Tensor | None = None
    sampler: Tensor | None = None
    reference: Tensor | None = None
    keep: Callable[[Tensor, Tensor], Tensor] | None = None

    def with_(self, **changes) -> "Expectation":
        return replace(self, **changes)

    @property
    def groups_PG(self) -> Tensor:
        return self.space.groups(self.group_size)

    @property
    def rewards_PG(self) -> Tensor:
        return self.rewards[self.groups_PG] if self.rewards.dim() == 1 else self.rewards

    @property
    def weights_P(self) -> Tensor:
        """The probability that mu draws each group, given that it is kept."""
        drawing = next(logits for logits in (self.sampler, self.old, self.policy) if logits is not None)
        weights_P = self.space.probabilities(drawing)[self.groups_PG].prod(dim=1)
        if self.keep is None:
            return weights_P
        rewards_PG = self.rewards_PG
        weights_P = weights_P * self.keep(rewards_PG, torch.ones_like(rewards_PG, dtype=torch.bool))
        return weights_P / weights_P.sum()

    def scored(self) -> ScoredGroups:
        """The groups as advantages see them."""
        rewards_PG = self.rewards_PG
        return ScoredGroups(
            slots_P=torch.arange(len(rewards_PG)),
            rewards_PG=rewards_PG,
            valid_PG=torch.ones_like(rewards_PG, dtype=torch.bool),
            values_PGK=rewards_PG[..., None],
            weights_K=torch.ones(1, dtype=torch.float64),
            lengths_PG=self.space.mask_YT.sum(dim=1)[self.groups_PG],
        )

    def _logprobs(self, logits_SV: Tensor | None) -> Tensor | None:
        if logits_SV is None:
            return None
        return self.space.scores(logits_SV).logprobs_BT.detach()[self.groups_PG.flatten()]

    def advantages(self, objective: Objective, coefficients: Coefficients) -> Tensor:
        """The advantages of the completions of all groups, [B, 1] or [B, T]."""
        mask_BT = self.space.mask_YT[self.groups_PG.flatten()]
        tokens = CompletionTokens(
            mask_BT=mask_BT,
            step_scores_BT=torch.zeros_like(mask_BT, dtype=torch.float64),
            is_step_BT=torch.zeros_like(mask_BT),
            old_logprobs_BT=self._logprobs(self.policy if self.old is None else self.old),
            reference_logprobs_BT=self._logprobs(self.reference),
        )
        return objective.advantages(self.scored(), coefficients, tokens=tokens if objective.needs_tokens else None)

    def batch(self, objective: Objective, coefficients: Coefficients) -> LossBatch:
        """The completions of all groups as the loss sees them."""
        mask_BT = self.space.mask_YT[self.groups_PG.flatten()]
        tokens_P = mask_BT.sum(dim=1).view(-1, self.group_size).sum(dim=1)
        drawing = next(logits for logits in (self.sampler, self.old, self.policy) if logits is not None)
        return LossBatch(
            advantages_BT=self.advantages(objective, coefficients),
            mask_BT=mask_BT,
            group_tokens_B=tokens_P.repeat_interleave(self.group_size),
            old_logprobs_BT=self._logprobs(self.old),
            reference_logprobs_BT=self._logprobs(self.reference) if objective.needs_reference else None,
            sampler_logprobs_BT=self._logprobs(drawing),
        )

    def ascent(self, objective: Objective) -> Tensor:
        """-E[gradient of the loss] with respect to the logits, [S, V]."""
        coefficients = objective.coefficients
        drawn_B = self.groups_PG.flatten()
        leaf = self.policy.detach().clone().requires_grad_()
        scores_YT = self.space.scores(leaf)
        scores = TokenScores(*(part[drawn_B].detach().requires_grad_() for part in scores_YT))
        batch = self.batch(objective, coefficients)
        loss = sum(
            objective.loss(_rows(scores, rows), _rows(batch, rows), counts, coefficients).loss
            for rows, counts in self._minibatches(batch)
        )
        slopes = torch.autograd.grad(loss, scores, allow_unused=True, materialize_grads=True)
        weights_B1 = self.weights_P.repeat_interleave(self.group_size)[:, None]
        totals = [
            torch.zeros_like(part).index_add(0, drawn_B, weights_B1 * slope)
            for part, slope in zip(scores_YT, slopes, strict=True)
        ]
        return -torch.autograd.grad(scores_YT, leaf, totals)[0]

    def _minibatches(self, batch: LossBatch):
        """The groups with equal denominators are computed together; their losses do not know of each other."""
        for tokens in batch.group_tokens_B.unique().tolist():
            counts = MinibatchCounts(tokens=tokens, sequences=self.group_size, groups=1)
            yield batch.group_tokens_B == tokens, counts


def _rows(parts, rows: Tensor):
    return type(parts)(*(None if part is None else part[rows] for part in parts))


def far(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where a number is not finite."""
    difference = (got.detach() - want.detach()).abs().max().item()
    return difference if difference == difference else float("inf")


def worst(*errors: float | Iterable[float]) -> float:
    """The largest of numbers and of lists of them; infinite where one is NaN, which `max` may pass over."""
    numbers = [number for error in errors for number in (error if isinstance(error, Iterable) else [error])]
    return max(float("inf") if number != number else number for number in numbers)


def one_minus_cosine(one: Tensor, other: Tensor) -> float:
    return 1 - torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def shortfall(value: float, minimum: float) -> float:
    """What a number that must be at least `minimum` lacks of it: an error like the others."""
    return max(0.0, minimum - value)
