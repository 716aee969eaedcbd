"""Drawing further prompts until there are enough groups to learn from, or enough has been tried."""

from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from grpo_lightning.groups.filter import GroupFilter
from grpo_lightning.groups.outcome import GroupOutcome, outcome_rows, outcomes_of
from grpo_lightning.groups.selection import ScoredRollout, Selection, joined, places, select


@dataclass(frozen=True, kw_only=True)
class Refill:
    """Rounds of drawing, each of as many prompts as an iteration has.

    Every rank makes the same number of rounds: it is decided on the outcomes of all ranks.

    Args:
        groups: Says which groups are kept, and how many rounds there may be.
        num_prompts: Of an iteration, over all ranks.
        num_minibatches: Of an iteration.
        threshold: A completion is solved by a total of at least this.
        rank: Of this process.
        num_ranks: Of the run.
        gather: A collective: from rows of a tensor to those of all ranks.
        exchange: A collective: from groups to those of each rank.
        draw: A further round, given the indices of the prompts drawn so far and the round's first slot; None where
            there are too few other prompts.
    """

    groups: GroupFilter
    num_prompts: int
    num_minibatches: int
    threshold: float
    rank: int
    num_ranks: int
    gather: Callable[[Tensor], Tensor]
    exchange: Callable[[list[ScoredRollout]], list[list[ScoredRollout]]]
    draw: Callable[[set[int], int], ScoredRollout | None]

    def select(self, first: ScoredRollout) -> Selection:
        """Draw on while groups are missing, then settle which ones the iteration looks at.

        Args:
            first: What this rank drew in the first round.
        """
        rounds = [first]
        outcomes = self._outcomes(first)
        while self._are_missing(outcomes) and len(rounds) < self.groups.max_rounds:
            more = self.draw({outcome.prompt_index for outcome in outcomes}, len(rounds) * self.num_prompts)
            if more is None:
                break
            rounds.append(more)
            outcomes += self._outcomes(more)
        self._say_what_is_missing(outcomes, len(rounds), first.rollout.iteration)
        drawn = joined(rounds)
        selected = drawn
        if len(rounds) > 1:
            taken = places(outcomes, num_prompts=self.num_prompts, num_minibatches=self.num_minibatches)
            selected = select(drawn, taken, rank=self.rank, num_ranks=self.num_ranks, exchange=self.exchange)
        return Selection(selected, drawn, tuple(outcomes), len(rounds))

    def _are_missing(self, outcomes: list[GroupOutcome]) -> bool:
        return sum(outcome.is_kept for outcome in outcomes) < self.num_prompts

    def _say_what_is_missing(self, outcomes: list[GroupOutcome], num_rounds: int, iteration: int) -> None:
        if self.groups.max_rounds > 1 and self._are_missing(outcomes):
            num_kept = sum(outcome.is_kept for outcome in outcomes)
            rank_zero_info(
                f"Iteration {iteration}: after {num_rounds} rounds {num_kept} of {self.num_prompts} groups have "
                "something to learn from; the run goes on with these."
            )

    def _outcomes(self, scored: ScoredRollout) -> list[GroupOutcome]:
        rollout, rewards = scored
        shape_PG = (len(rollout.prompts), rollout.group_size)
        keep_P = self.groups.keep(rewards.totals_B.view(shape_PG), rewards.valid_B.view(shape_PG))
        return outcomes_of(self.gather(outcome_rows(rollout, rewards, keep_P, threshold=self.threshold)))
