import pytest

from grpo_lightning.callbacks.language_consistency import LanguageConsistency
from grpo_lightning.types import Completion, ConfigurationError, FinishReason


def score(text, language):
    completion = Completion(token_ids=(1,), sampler_logprobs=(0.0,), text=text, finish_reason=FinishReason.EOS)
    return LanguageConsistency(language).score([], [completion])[0]


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("We add two and two.", "en", 1.0),
        ("We add 加", "en", 2 / 3),
        ("We add 加", "zh", 1 / 3),
        ("Сложим two", "ru", 1 / 2),
        ("両方を足す", "ja", 1.0),
        ("両方を足す", "zh", 3 / 5),  # 両 方 足 are Chinese characters, を す are not
        ("안녕 hello", "ko", 1 / 2),
        ("所以 $x = two$ <think>", "zh", 1.0),
        ("Nous sommes ici", "en", 1.0),  # a limit: scripts are told apart, not languages
    ],
)
def test_the_share_of_words_by_hand(text, language, share):
    assert score(text, language) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("text", ["", "2+2=4", "x = y", "$\\frac{one}{two}$"])
def test_a_text_without_words_is_not_applicable(text):
    assert score(text, "en") is None


def test_an_unknown_language_is_an_error_that_names_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"LanguageConsistency\.language .*en.*zh.*'klingon'"):
        LanguageConsistency("klingon")
