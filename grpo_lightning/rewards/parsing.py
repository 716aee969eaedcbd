r"""Final answers out of free text: pure functions, each with its rule and examples.

All of them look for the LAST answer, since a completion may change its mind, and give None where there is none. A
blank answer is none.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_LATEX_GROUPING = re.compile(r"(?<=\d)(?:\\,|\\!|\{,\})(?=\d{3})")

# A sign counts only where nothing stands before it that it could be subtracted from: "5-3" ends in 3, "= -3" in -3.
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w.)\]}%]) [-+] )? \$? (?P<dollar_sign> (?<=\$) - )?
    (?P<value> (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
    (?P<exponent> [eE][-+]?\d{1,3}(?!\w) )?
    (?: \s?/\s? (?P<denominator> 0*[1-9]\d* ) (?![\d.]) )?
    """,
    re.VERBOSE | re.ASCII,
)
_MAX_DIGITS = 400  # longer numbers are noise; Python refuses to read them at 4300

_OPEN_THINK, _CLOSE_THINK, _OPEN_ANSWER, _CLOSE_ANSWER = "<think>", "</think>", "<answer>", "</answer>"


class ThoughtAndAnswer(NamedTuple):
    """The two parts of a completion in the format of DeepSeek-R1."""

    thought: str
    answer: str


def after_marker(text: str, marker: str, end_marker: str = "") -> str | None:
    r"""What stands after the last `marker`: up to `end_marker`, or to the end of its line if that is empty.

    Example:
        >>> after_marker("12 * 6 = 72\n#### 72\n", "####")
        '72'
        >>> after_marker("<answer>1</answer> no, <answer> 2\n</answer>", "<answer>", "</answer>")
        '2'
        >>> after_marker("<answer>cut o", "<answer>", "</answer>") is None
        True
    """
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    if not end_marker:
        return rest.split("\n", 1)[0].strip() or None
    answer, ended, _ = rest.partition(end_marker)
    return (answer.strip() or None) if ended else None


def boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, with its braces balanced.

    Example:
        >>> boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> boxed(r"\boxed{\{1, 2\}}")
        '\\{1, 2\\}'
        >>> boxed(r"first \boxed{7}, then \boxed{8")
        '7'
    """
    # One pass, with a stack of the open braces: a completion that repeats itself for ever must not take for ever.
    opened: list[int | None] = []
    start, end = 0, 0
    for match in _BRACES.finditer(text):
        if match["box"] or match["open"]:
            opened.append(match.end() if match["box"] else None)
        elif match["close"] and opened:
            box = opened.pop()
            if box is not None and box > start:
                start, end = box, match.start()
    return text[start:end].strip() or None


def think_and_answer(text: str, *, prompt_opens_think: bool = False) -> ThoughtAndAnswer | None:
    r"""The two parts of a text that has exactly the form ``<think>...</think><answer>...</answer>``.

    The grammar, with whitespace allowed between its parts::

        text    = "<think>" content "</think>" "<answer>" content "</answer>"
        content = any text that is not blank and has none of the four tags in it

    With `prompt_opens_think` the first tag is part of the prompt and must not be repeated.

    Example:
        >>> think_and_answer("<think>2 and 2</think>\n<answer>4</answer>")
        ThoughtAndAnswer(thought='2 and 2', answer='4')
        >>> think_and_answer("<think>2 and 2</think>It is <answer>4</answer>") is None
        True
    """
    rest = text.strip()
    if not prompt_opens_think:
        if not rest.startswith(_OPEN_THINK):
            return None
        rest = rest.removeprefix(_OPEN_THINK)
    thought, closed, rest = rest.partition(_CLOSE_THINK)
    rest = rest.strip()
    if not (closed and rest.startswith(_OPEN_ANSWER) and rest.endswith(_CLOSE_ANSWER)):
        return None
    answer = rest.removeprefix(_OPEN_ANSWER).removesuffix(_CLOSE_ANSWER)
    for content in (thought, answer):
        tags = (_OPEN_THINK, _CLOSE_THINK, _OPEN_ANSWER, _CLOSE_ANSWER)
        if not content.strip() or any(tag in content for tag in tags):
            return None
    return ThoughtAndAnswer(thought.strip(), answer.strip())


def last_number(text: str) -> Fraction | None:
    r"""The last number of a text, exactly.

    Read are signs, thousands separated by commas, decimals, exponents, fractions (``3/4``, ``\frac{3}{4}``) and
    amounts in dollars. A percent sign is passed over: data sets write the answer to "how many percent?" as ``20``.

    Example:
        >>> last_number("She pays $1,234.50 in all.")
        Fraction(2469, 2)
        >>> [str(last_number(text)) for text in ("5-3", "x = -3", "3/4 of it", "20%", "4.", "-$5", "1e3")]
        ['3', '-3', '3/4', '20', '4', '-5', '1000']
        >>> last_number("none") is None
        True
    """
    text = _LATEX_FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))
    text = _LATEX_GROUPING.sub("", text).replace("\\$", "$")
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 - the last one is what is wanted
        pass
    return _to_fraction(last) if last is not None else None


def normalise(text: str) -> str:
    """A text without differences that a reader would not call one: case, width, spacing, a full stop at the end.

    Example:
        >>> normalise("  New\u00a0York. ")
        'new york'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).removesuffix(".").rstrip()


def _to_fraction(match: "re.Match[str]") -> Fraction | None:
    """The value of a match of `_NUMBER`."""
    if len(match[0]) > _MAX_DIGITS:
        return None
    value = Fraction(match["value"].replace(",", "") + (match["exponent"] or ""))
    if match["denominator"]:
        value /= int(match["denominator"])
    return -value if "-" in (match["sign"], match["dollar_sign"]) else value
