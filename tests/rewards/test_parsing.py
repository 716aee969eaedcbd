import doctest
import time
from fractions import Fraction

import pytest

from grpo_lightning.rewards import function_reward, parsing, scripts
from grpo_lightning.rewards.parsing import after_marker, boxed, last_number, normalise, think_and_answer
from grpo_lightning.rewards.scripts import words_by_script


@pytest.mark.parametrize("module", [parsing, scripts, function_reward])
def test_the_examples_of_the_docstrings_hold(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("-7", -7),
        ("+7", 7),
        ("\N{MINUS SIGN}7", -7),
        ("(-7)", -7),
        ("10-3", 3),  # a difference, not minus three
        ("x-3", 3),
        ("f(2)-3", 3),
        ("50%-3", 3),
        ("= -3", -3),
        ("1,234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1,2", 2),  # two numbers
        ("1,23", 23),
        ("12,3456", 3456),
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("It is 5.", 5),
        ("3/4", Fraction(3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        ("3/0", 0),  # no fraction: two numbers
        ("$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        (r"\$1,000", 1000),
        (r"1\,000", 1000),
        ("1{,}000", 1000),
        ("20%", 20),
        (r"20\%", 20),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("3 apples and 4 pears", 4),
        ("72 km", 72),
        ("007", 7),
    ],
)
def test_last_number_by_hand(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("text", ["", "none", "-", "$", "...", "9" * 5000])
def test_no_number_is_none(text):
    assert last_number(text) is None


def test_a_huge_exponent_is_not_computed():
    assert last_number("1e999999999") == 999999999  # read as two numbers: more than three digits are no exponent


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed {4}", "4"),
        (r"\boxed{ \frac{1}{\sqrt{2}} }", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"{ \boxed{5}", "5"),  # an open brace of the text around it
        (r"} \boxed{5} }", "5"),
        (r"\boxed{6", None),
        (r"\boxed{}", None),
        (r"boxed{7}", None),
        ("", None),
    ],
)
def test_boxed_by_hand(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "marker", "end_marker", "answer"),
    [
        ("so\n#### 72", "####", "", "72"),
        ("#### 7\n#### 8 \nmore", "####", "", "8"),
        ("####", "####", "", None),
        ("####\n72", "####", "", None),
        ("72", "####", "", None),
        ("<answer>a\nb</answer>", "<answer>", "</answer>", "a\nb"),
        ("<answer> </answer>", "<answer>", "</answer>", None),
    ],
)
def test_after_marker_by_hand(text, marker, end_marker, answer):
    assert after_marker(text, marker, end_marker) == answer


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" \n<think>\na\n</think>\n\n<answer> b </answer>\n", True),
        ("<think>a < b > c</think><answer>b</answer>", True),
        ("<think></think><answer>b</answer>", False),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think>", False),
        ("<answer>b</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b", False),
        ("<think>a<answer>b</answer>", False),
        ("well <think>a</think><answer>b</answer>", False),
        ("<think>a</think> so <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer> bye", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("<think><think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<think>a<answer>b</answer></think><answer>c</answer>", False),
        ("<think>a</think><answer>b</think></answer>", False),
        ("<Think>a</Think><Answer>b</Answer>", False),
        ("", False),
    ],
)
def test_the_grammar_of_think_and_answer(text, is_right):
    assert (think_and_answer(text) is not None) is is_right


def test_a_prompt_that_opens_the_thought_must_not_be_followed_by_another_opening():
    assert think_and_answer("a</think><answer>b</answer>", prompt_opens_think=True) == ("a", "b")
    assert think_and_answer("<think>a</think><answer>b</answer>", prompt_opens_think=True) is None


def test_normalise_by_hand():
    assert normalise(" The\tANSWER\n is \N{FULLWIDTH DIGIT FOUR}. ") == "the answer is 4"
    assert normalise("3.14") == "3.14"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, big world!", ["Hello", "big", "world"]),
        ("x + y = 12", []),
        (r"$\alpha = foo$ and \[bar\] or \(baz\) \textbf", ["and", "or"]),
        ("<think>yes</think>", ["yes"]),
        ("你好world", ["你", "好", "world"]),
        ("カード人々", ["カ", "ー", "ド", "人", "々"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("नमस्ते", ["नमस्ते"]),
        ("naïve cafe\N{COMBINING ACUTE ACCENT}s", ["naïve", "cafe\N{COMBINING ACUTE ACCENT}s"]),
        ("", []),
    ],
)
def test_words_by_hand(text, words):
    assert [word for word, _ in words_by_script(text)] == words


def test_the_scripts_of_words():
    scripts_found = [script for _, script in words_by_script("да yes はカ人 네네 ωψ लो")]
    assert scripts_found == ["CYRILLIC", "LATIN", "HIRAGANA", "KATAKANA", "CJK", "HANGUL", "GREEK", "DEVANAGARI"]


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "{", "<think>", "$", "\\(", "\\[", "1,234,", "1/", "-", "#", "a ", "9", "e1", "$$ "]
)
def test_a_text_that_repeats_itself_is_parsed_in_no_time(unit):
    text = unit * (60_000 // len(unit))
    start = time.process_time()
    for parse in (last_number, boxed, think_and_answer, normalise, words_by_script):
        parse(text)
    after_marker(text, "#")
    assert time.process_time() - start < 2.0  # quadratic time would be minutes
