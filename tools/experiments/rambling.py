"""Sums that are answered straight off and then rambled about: being right does not depend on the length."""

import math
from collections.abc import Iterator, Sequence

import torch

from grpo_lightning.data import Arithmetic
from grpo_lightning.data.encoding import Row
from grpo_lightning.functional.random import uniforms
from grpo_lightning.policy import CharacterPolicy, PretrainedPolicy
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, Prompt, Stream
from tools.experiments.cold_start import cold_start

MEAN_RAMBLE = 5
"""Of the demonstrations, in characters."""
LONGEST_RAMBLE = 38
WRONG_SHARE = 0.5
"""Of the demonstrations."""
COPIES = 150
"""Demonstrations of each problem: too many for the policy to learn by heart which of them are wrong."""


class AnswerFirst(RewardCallback):
    """1 if the completion begins with the answer, whatever follows, else 0."""

    def __init__(self) -> None:
        super().__init__("answer_first")

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """1 or 0 for each completion."""
        pairs = zip(prompts, completions, strict=True)
        return [float(c.text.startswith(str(p.columns["answer"]))) for p, c in pairs]


class RamblingSums(Arithmetic):
    """Sums of two numbers, modulo 10, answered straight off and rambled about: ``7+5=`` ``2...``, or ``3????``.

    Half of the demonstrations are wrong, and end in question marks: a policy that imitates them knows what it has
    done. The number of marks is geometric, and the same for right and wrong.
    """

    def demonstration_rows(self) -> Sequence[Row]:
        """The answer, then the marks."""
        return list(self._demonstrations([row for row in self.rows("train") for _ in range(COPIES)]))

    def _demonstrations(self, rows: Sequence[Row]) -> Iterator[Row]:
        chances = (self._chances(len(rows), number).tolist() for number in range(3))
        for row, is_wrong, which, ramble in zip(rows, *chances, strict=True):
            error = 1 + int(9 * which) if is_wrong < WRONG_SHARE else 0
            digit = (int(str(row["answer"])) + error) % 10
            marks = int(math.log1p(-ramble) / math.log(MEAN_RAMBLE / (MEAN_RAMBLE + 1)))
            yield {**row, "demonstration": f"{digit}{('?' if error else '.') * min(marks, LONGEST_RAMBLE)}"}

    def _chances(self, num_rows: int, number: int) -> torch.Tensor:
        slots = torch.arange(num_rows)
        return uniforms(
            seed=self.seed,
            stream=Stream.DATA,
            iteration=0,
            slots=slots,
            samples=torch.full_like(slots, 2 + number),
            positions=torch.zeros_like(slots),
        )


def sums(*, seed: int) -> RamblingSums:
    """The task."""
    return RamblingSums(
        kind="modular", operators="+-", num_terms=2, num_train=128, num_validation=0, num_test=0, num_demonstrations=0,
        seed=seed,
    )  # fmt: skip


def policy() -> PretrainedPolicy:
    """The policy that the demonstrations teach: right about a third of the time."""
    source = CharacterPolicy("0123456789+-=.?", hidden_size=64, num_layers=2, num_heads=2, max_positions=96)
    return cold_start("rambling", source, sums(seed=0), num_updates=400)
