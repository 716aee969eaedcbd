# ruff: noqa: RUF001 - letters of other scripts that look alike are what this is about
import time

import pytest

from grpo_lightning.rewards.scripts import SCRIPTS_OF_LANGUAGE, words_by_script


def words(text):
    return [word for word, _ in words_by_script(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So x = 2, 所以 да", [("So", "LATIN"), ("所", "CJK"), ("以", "CJK"), ("да", "CYRILLIC")]),
        ("don't", [("don", "LATIN")]),  # an apostrophe ends a word, and a letter alone is none
        ("naïve Ωμέγα", [("naïve", "LATIN"), ("Ωμέγα", "GREEK")]),
        ("helloпривет", [("hello", "LATIN"), ("привет", "CYRILLIC")]),  # a word has one script
        ("ソート", [("ソ", "KATAKANA"), ("ー", "KATAKANA"), ("ト", "KATAKANA")]),
        ("人々", [("人", "CJK"), ("々", "CJK")]),
        ("ＡＢＣ", [("ＡＢＣ", "LATIN")]),
        ("หน", [("ห", "THAI"), ("น", "THAI")]),
    ],
)
def test_words_by_hand(text, expected):
    assert words_by_script(text) == expected


@pytest.mark.parametrize("text", ["", "42 + 7 = 49!", "x + y", "\n\t", "3.14 €", "🙂🙂"])
def test_what_is_no_language_has_no_words(text):
    assert words(text) == []


@pytest.mark.parametrize(
    "text",
    ["$two$", "$$two\ntwo$$", r"\(two\)", r"\[two\]", r"\frac \alpha", "<think></think>", "<answer>"],
)
def test_mathematics_and_tags_are_left_out(text):
    assert words(f"one {text} three") == ["one", "three"]


def test_a_lone_dollar_is_no_mathematics():
    assert words("It costs $5 and\nthat is $6") == ["It", "costs", "and", "that", "is"]


def test_a_vowel_sign_belongs_to_its_word():
    # The vowel signs of Devanagari are marks and no letters: without them the word would fall into letters.
    assert words("हिंदी") == ["हिंदी"]
    assert words("cafe\u0301") == ["cafe\u0301"]


def test_hostile_texts_take_no_longer_than_others():
    start = time.process_time()
    for text in ("\\(" * 20_000, "$$" * 20_000 + "$", "<" * 40_000, "\\[" * 20_000 + "a"):
        words_by_script(text)
    assert time.process_time() - start < 5.0  # 0.3 s on a quiet core; without bounds, minutes


def test_every_language_names_scripts_that_occur():
    samples = {"ar": "سلام", "el": "λόγος", "en": "word", "he": "שלום", "hi": "नमस्ते", "ja": "ひらカタ漢", "ko": "한국",
               "ru": "слово", "th": "คน", "zh": "汉字"}  # fmt: skip
    assert {
        name: {script for _, script in words_by_script(text)} for name, text in samples.items()
    } == SCRIPTS_OF_LANGUAGE
