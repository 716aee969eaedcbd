"""What the papers' formulas are written in: numbers, or scalar tensors where something is differentiated."""

import math
from collections.abc import Iterator, Sequence

from papers.batches import Answer, Groups, Token
from torch import Tensor

Number = float | Tensor


def exp(x: Number) -> Number:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def log(x: Number) -> Number:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def sg(x: Number) -> float:
    """Stop-gradient."""
    return x.item() if isinstance(x, Tensor) else x


def clip(x: Number, low: float, high: float) -> Number:
    """Python's min and max hand over one of the two, so that a clipped value is a number without a gradient."""
    return min(max(x, low), high)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """Of a sample: the sum of squares over one less than their number. No paper says which; 0 where there is one."""
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / max(len(values) - 1, 1))


def rewards(group: Sequence[Answer]) -> list[float]:
    return [answer.total for answer in group]


def is_mixed(group: Sequence[Answer]) -> bool:
    """Whether the rewards differ, so that there is something to learn."""
    return len(set(rewards(group))) > 1


def flat(groups: Groups) -> list[Answer]:
    return [answer for group in groups for answer in group]


def tokens_of(groups: Groups) -> Iterator[Token]:
    return (token for answer in flat(groups) for token in answer.tokens)


def centred(group: Sequence[Answer]) -> list[float]:
    """r - mean(r)."""
    return [r - mean(rewards(group)) for r in rewards(group)]


def normalised(group: Sequence[Answer]) -> list[float]:
    """(r - mean(r)) / std(r), DeepSeekMath, section 4.1.2."""
    return [a / (std(rewards(group)) + 1e-6) for a in centred(group)]


def leave_one_out(values: Sequence[float]) -> list[float]:
    """r_i - mean of the others; nothing where there are no others."""
    if len(values) == 1:
        return [0.0]
    return [value - mean([*values[:i], *values[i + 1 :]]) for i, value in enumerate(values)]


def min_clip(ratio: Number, advantage: float, low: float, high: float) -> Number:
    """min[rho A, clip(rho, 1 - low, 1 + high) A], PPO, equation 7."""
    return min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def k3(token: Token) -> Number:
    """DeepSeekMath, equation 4."""
    x = exp(token.reference - token.now)
    return x - log(x) - 1
