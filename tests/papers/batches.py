"""Random iterations as plain lists: what was drawn, what the rewards said of it, and every log-probability.

Each token of an iteration has a number of its own, so that a policy is a list: the log-probability of every token.
"""

import math
import random
from dataclasses import dataclass

from torch import Tensor

WEIGHTS = {"correct": 1.0, "format": 0.5, "steps": 0.2}
"""The rewards: right or wrong; a grade, which does not apply to every completion; scores of steps."""
FAILED = math.nan

Steps = dict[int, float]
"""The score of each step, by the position of its last token."""


@dataclass(frozen=True)
class Drawn:
    """A completion: the numbers of its tokens, and what each reward said; None where a reward does not apply."""

    token_ids: range
    is_mine: tuple[bool, ...]
    """False for tokens that the policy did not draw, such as the output of a tool."""
    is_truncated: bool
    scores: dict[str, float | Steps | None]

    @property
    def has_failed(self) -> bool:
        return any(score != score for score in self.scores.values())


@dataclass(frozen=True)
class Iteration:
    """Groups of completions, and what three policies say of each token."""

    groups: list[list[Drawn]]
    old: list[float]
    sampler: list[float]
    reference: list[float]
    drift: list[float]

    def now(self, update: int) -> list[float]:
        """The policy at an update of the iteration: at the first it is the old one."""
        step = (0.0, 1.0, -0.6, 0.3)[update]
        return [old + step * drift for old, drift in zip(self.old, self.drift, strict=True)]


@dataclass(frozen=True)
class Token:
    """A token that the policy drew, as a paper sees it: its place in the completion, and its log-probabilities."""

    position: int
    now: Tensor
    old: float
    sampler: float
    reference: float


@dataclass(frozen=True)
class Answer:
    """A completion whose rewards did not fail, as a paper sees it."""

    scores: dict[str, float | Steps | None]
    last_position: int
    tokens: list[Token]

    def reward(self, name: str) -> float | None:
        """What a reward said of the whole completion."""
        score = self.scores[name]
        return sum(score.values()) if isinstance(score, dict) else score

    @property
    def total(self) -> float:
        """The weighted sum of the rewards that apply."""
        return sum(weight * (self.reward(name) or 0.0) for name, weight in WEIGHTS.items())

    @property
    def steps(self) -> Steps:
        """What the rewards say of each position; a reward without steps speaks of the last."""
        result: Steps = {}
        for name, weight in WEIGHTS.items():
            score = self.scores[name]
            for end, value in (score if isinstance(score, dict) else {self.last_position: score}).items():
                if value is not None:
                    result[end] = result.get(end, 0.0) + weight * value
        return result


Groups = list[list[Answer]]


def answers(iteration: Iteration, now: Tensor) -> Groups:
    """The iteration as a paper sees it: completions with a failed reward are not there."""

    def tokens(drawn: Drawn) -> list[Token]:
        return [
            Token(position, now[n], iteration.old[n], iteration.sampler[n], iteration.reference[n])
            for position, n in enumerate(drawn.token_ids)
            if drawn.is_mine[position]
        ]

    return [
        [Answer(d.scores, len(d.token_ids) - 1, tokens(d)) for d in group if not d.has_failed]
        for group in iteration.groups
    ]


KINDS = ("mixed", "wrong", "mixed", "two left", "mixed", "mixed", "right", "mixed", "one left", "none left")
"""Of two minibatches. In mixed groups the rewards differ; of some groups few completions or none could be scored."""
NUM_LEFT = {"two left": 2, "one left": 1, "none left": 0, "mixed": 5, "wrong": 6, "right": 6}


def random_iteration(seed: int) -> Iteration:
    """Ten groups of six completions of one to nine tokens."""
    rng = random.Random(seed)
    groups: list[list[Drawn]] = []
    count = 0
    for kind in KINDS:
        groups.append([])
        for index in range(6):
            ids = range(count, count + rng.randint(1, 9))
            count = ids.stop
            # One token in five is not the policy's own, but never all of a completion.
            is_mine = tuple(p == 0 or rng.random() < 0.8 for p in range(len(ids)))
            scores = _scores(rng, kind, index, len(ids))
            groups[-1].append(Drawn(ids, is_mine, rng.random() < 0.3, scores))
    old = [rng.uniform(-3.0, -0.05) for _ in range(count)]
    return Iteration(
        groups=groups,
        old=old,
        sampler=[o + rng.gauss(0, 0.6) for o in old],
        reference=[o + rng.gauss(0, 0.5) for o in old],
        drift=[rng.gauss(0, rng.choice([0.2, 1.8])) for _ in range(count)],
    )


def _scores(rng: random.Random, kind: str, index: int, length: int) -> dict[str, float | Steps | None]:
    if kind in ("wrong", "right"):
        # Numbers that have an exact mean: what rounding would leave of it, a deviation of 1e-6 would blow up.
        return {"correct": float(kind == "right"), "format": 0.75, "steps": None}
    if index >= NUM_LEFT[kind]:  # the first reward raises, the second says NaN
        return {"correct": FAILED, "format": 1.0, "steps": None} if index % 2 else {"correct": 1.0, "format": FAILED}
    ends = sorted(rng.sample(range(length), rng.randint(1, min(3, length))))
    return {
        "correct": float(index == 1 or (index > 1 and rng.random() < 0.15)),
        "format": rng.choice([None, 0.0, 0.25, 0.6, 1.0]),
        "steps": {end: rng.uniform(0, 0.5) for end in ends} if rng.random() < 0.8 else None,
    }
