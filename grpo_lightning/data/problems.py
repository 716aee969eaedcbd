"""Arithmetic problems, and how their working is written down."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Working = Literal["steps", "chained", "totals"]
Rule = Callable[[int, str, int], tuple[str, int]]
"""Running value, operator drawn and next number -> the operator that is used, and the new running value."""


class Step(NamedTuple):
    """One operation. Example: ``Step(7, "+", 5, 12)``."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        right = f"({self.right})" if self.right < 0 else str(self.right)
        return f"{self.left}{self.operator}{right}={self.result}"


class Problem(NamedTuple):
    """A problem with its working. Example: ``Problem("7+5", (Step(7, "+", 5, 12),))``."""

    text: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        """The result of the last step."""
        return str(self.steps[-1].result)


def calculate(left: int, operator: str, right: int) -> int:
    """The value of one operation on integers."""
    if operator == "*":
        return left * right
    return left + right if operator == "+" else left - right


def chain(terms: Sequence[int], operators: Sequence[str], rule: Rule) -> Problem:
    """Operations applied from left to right, whatever their precedence elsewhere.

    Args:
        terms: The numbers, at least two.
        operators: One fewer.
        rule: What a step computes.

    Example:
        >>> chain([7, 5, 8], ["+", "-"], modular(10)).steps[0]
        Step(left=7, operator='+', right=5, result=2)
    """
    value, text, steps = terms[0], str(terms[0]), []
    for drawn, term in zip(operators, terms[1:], strict=True):
        operator, result = rule(value, drawn, term)
        steps.append(Step(value, operator, term, result))
        value, text = result, f"{text}{operator}{term}"
    return Problem(text, tuple(steps))


def integer(value: int, operator: str, term: int) -> tuple[str, int]:
    """The rule of ordinary integers."""
    return operator, calculate(value, operator, term)


def modular(modulus: int) -> Rule:
    """The rule of remainders: every step's result is in 0 .. modulus - 1."""
    return lambda value, operator, term: (operator, calculate(value, operator, term) % modulus)


def bounded(max_value: int) -> Rule:
    """The rule of integers that stay in 0 .. max_value: plus becomes minus, or minus plus, where they would leave."""

    def rule(value: int, operator: str, term: int) -> tuple[str, int]:
        result = calculate(value, operator, term)
        if 0 <= result <= max_value:
            return operator, result
        other = "-" if operator == "+" else "+"
        return other, calculate(value, other, term)

    return rule


def bracketed(terms: Sequence[int], operators: Sequence[str], cuts: Sequence[float]) -> Problem:
    """An expression whose every operation but the last stands in brackets; the working goes from the inside out.

    Args:
        terms: The numbers, at least two.
        operators: One fewer; the i-th stands between the numbers i and i + 1.
        cuts: As many as operators, in [0, 1): where an expression divides into two.

    Example:
        >>> bracketed([3, 4, 2], ["+", "*"], [0.9, 0.0]).text
        '(3+4)*2'
    """
    steps: list[Step] = []
    cut = iter(cuts)

    def expression(first: int, last: int) -> tuple[str, int]:
        if first == last:
            return str(terms[first]), terms[first]
        middle = first + int(next(cut) * (last - first))
        (left_text, left), (right_text, right) = expression(first, middle), expression(middle + 1, last)
        steps.append(Step(left, operators[middle], right, calculate(left, operators[middle], right)))
        return f"({left_text}{operators[middle]}{right_text})", steps[-1].result

    text, _ = expression(0, len(terms) - 1)
    return Problem(text[1:-1], tuple(steps))


def rounded(value: int, unit: int) -> int:
    """The multiple of `unit` next to an integer; of two equally near ones the greater.

    Example:
        >>> [rounded(value, 3) for value in (-2, 0, 1, 2, 4, 5)]
        [-3, 0, 0, 3, 3, 6]
    """
    return (2 * value + unit) // (2 * unit) * unit


def write_working(problem: Problem, style: Working) -> str:
    """The steps on the way to the answer.

    Args:
        problem: A problem.
        style: ``steps`` writes every step in full, ``chained`` does not repeat the running value (of a chain),
            ``totals`` writes the results alone.

    Example:
        >>> problem = chain([37, 85, 46], ["+", "-"], integer)
        >>> [write_working(problem, style) for style in ("steps", "chained", "totals")]
        ['37+85=122,122-46=76', '37+85=122-46=76', '122,76']
    """
    steps = problem.steps
    if style == "totals":
        return ",".join(str(step.result) for step in steps)
    if style == "steps":
        return ",".join(map(str, steps))
    return str(steps[0].left) + "".join(f"{step.operator}{step.right}={step.result}" for step in steps)
