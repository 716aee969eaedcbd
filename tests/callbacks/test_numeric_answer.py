import pytest

from grpo_lightning.callbacks.numeric_answer import NumericAnswer
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt


def completion(text):
    return Completion(token_ids=(1,), sampler_logprobs=(0.0,), text=text, finish_reason=FinishReason.EOS)


def score(text, answer="72", **settings):
    prompt = Prompt(index=5, token_ids=(1,), text="", columns={"answer": answer})
    return NumericAnswer(**settings).score([prompt], [completion(text)])[0]


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("She has 72 clips.", "72", 1.0),
        ("72.0", "72", 1.0),
        ("$72", 72, 1.0),
        ("72 of 100", "72", 0.0),
        ("-72", "72", 0.0),
        ("none", "72", 0.0),
        ("", "72", 0.0),
        ("1,234", "1234", 1.0),
        ("1/2", "0.5", 1.0),
        (r"\frac{7}{2}", 3.5, 1.0),
        ("72", "48/2 = 24\n48 + 24 = 72\n#### 72", 1.0),
        ("0", 0, 1.0),
        ("0.0000001", 0, 0.0),
    ],
)
def test_the_last_number_must_be_equal(text, answer, value):
    assert score(text, answer) == value


def test_tolerances_are_inclusive_and_the_larger_one_counts():
    assert score("0.3333", "1/3", relative_tolerance=1e-3) == 1.0  # differs by 1e-4 of 1/3
    assert score("0.3333", "1/3", relative_tolerance=1e-5) == 0.0
    assert score("73", "72", absolute_tolerance=1.0) == 1.0
    assert score("73.5", "72", absolute_tolerance=1.0) == 0.0
    assert score("73", "72", absolute_tolerance=0.5, relative_tolerance=0.02) == 1.0  # 0.02 * 72 = 1.44


def test_only_what_stands_behind_the_marker_counts():
    assert score("#### 72\nI had 100.", marker="####") == 1.0
    assert score("I had 72.", marker="####") == 0.0
    assert score("<answer>\n72</answer>.", marker="<answer>", end_marker="</answer>") == 1.0


def test_equal_numbers_are_one_vote():
    reward = NumericAnswer()
    assert reward.answer(completion("3.50")) == reward.answer(completion("7/2")) == "7/2"
    assert reward.answer(completion("none")) is None


def test_a_row_without_an_answer_is_not_applicable():
    assert score("72", None) is None


def test_a_row_without_a_number_is_a_configuration_error_that_names_the_row():
    with pytest.raises(ConfigurationError, match=r"'answer', but row 5 .*'yes'"):
        score("72", "yes")


@pytest.mark.parametrize("key", ["absolute_tolerance", "relative_tolerance"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_negative_tolerance_is_a_configuration_error(key, value):
    with pytest.raises(ConfigurationError, match=key):
        NumericAnswer(**{key: value})


def test_a_marker_that_was_read_as_a_comment_is_an_error():
    with pytest.raises(ConfigurationError, match="YAML file"):
        NumericAnswer(marker=None)
