"""Words, and the scripts they are written in."""

import functools
import re
import unicodedata

SCRIPTS_OF_LANGUAGE = {
    "ar": frozenset({"ARABIC"}),
    "el": frozenset({"GREEK"}),
    "en": frozenset({"LATIN"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "ru": frozenset({"CYRILLIC"}),
    "th": frozenset({"THAI"}),
    "zh": frozenset({"CJK"}),
}
"""The scripts that a language is written in, as Unicode names its characters."""

_WITHOUT_SPACES = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI"})
_NOT_LANGUAGE = re.compile(
    r"""
    </?[A-Za-z]+>                        # tags of the answer's format
  | \$\$.{1,1000}?\$\$ | \$[^$\n]+\$     # mathematics; bounded, lest a text of opening brackets take for ever
  | \\\(.{1,1000}?\\\) | \\\[.{1,1000}?\\\]
  | \\[A-Za-z]+                          # LaTeX commands outside of it
    """,
    re.VERBOSE | re.DOTALL,
)


def words_by_script(text: str) -> list[tuple[str, str]]:
    r"""The words of a text, each with its script.

    A word is a longest run of letters of one script. In scripts without spaces between words (Chinese, Japanese,
    Thai) each letter counts as a word. Left out are digits, punctuation, mathematics (``$...$``, ``\(...\)``,
    ``\[...\]``, LaTeX commands), tags like ``<think>``, and single letters of an alphabet, which are names of variables
    in every language.

    Example:
        >>> words_by_script("So x = 2, 所以 да")
        [('So', 'LATIN'), ('所', 'CJK'), ('以', 'CJK'), ('да', 'CYRILLIC')]
    """
    words: list[tuple[str, str]] = []
    run, run_script = "", ""
    for character in _NOT_LANGUAGE.sub(" ", text) + " ":
        is_mark = run_script != "" and unicodedata.category(character).startswith("M")  # a vowel sign or an accent
        script = run_script if is_mark else _script(character)
        if run and (script != run_script or (script in _WITHOUT_SPACES and not is_mark)):
            words.append((run, run_script))
            run = ""
        run, run_script = (run + character, script) if script else ("", "")
    return [(word, script) for word, script in words if len(word) > 1 or script in _WITHOUT_SPACES]


@functools.lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """The script of a letter, "" for anything else: the first word of the character's Unicode name."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    script = name.partition(" ")[0].partition("-")[0]  # the long vowel of kana is "KATAKANA-HIRAGANA ..."
    return "CJK" if script == "IDEOGRAPHIC" else script  # the sign that repeats a character
