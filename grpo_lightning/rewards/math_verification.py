"""The judgement of math-verify on one answer, as a worker process runs it.

The worker loads this file by itself, without the package around it: that keeps the process small and quick to start.
math-verify's own time limits are alarm signals, which do nothing off the main thread; they are off here, and the
worker's deadline takes their place.
"""

import logging

for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they warn of the limits that are off, on purpose


def verify_answer(*, expected: str, completion: str, correct: float, incorrect: float) -> list[float | None]:
    r"""Whether the last answer in `completion` is mathematically equal to `expected`.

    An answer that math-verify cannot read or compare is incorrect.

    Args:
        expected: The answer, in LaTeX or plain, with or without dollar signs around it.
        completion: The text to judge. What ``\boxed`` holds takes precedence; without one, the last expression counts.
        correct: The score of a right answer.
        incorrect: The score of any other.

    Returns:
        One score; None where `expected` itself cannot be read.
    """
    from math_verify import parse, verify

    has_delimiters = "$" in expected or "\\boxed" in expected
    gold = parse(expected if has_delimiters else f"${expected}$", parsing_timeout=None)
    if not gold:
        return [None]
    answer = parse(completion, parsing_timeout=None)
    return [correct if answer and verify(gold, answer, timeout_seconds=None) else incorrect]
