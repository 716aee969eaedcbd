import pytest
from jsonargparse import ArgumentParser

from grpo_lightning.callbacks.exact_answer import ExactAnswer
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt


def completion(text):
    return Completion(token_ids=(1,), sampler_logprobs=(0.0,), text=text, finish_reason=FinishReason.EOS)


def score(text, answer="42", **settings):
    prompt = Prompt(index=0, token_ids=(1,), text="", columns={"answer": answer})
    return ExactAnswer(**settings).score([prompt], [completion(text)])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6*7=42#42", 1.0),
        ("6*7=42# 42 \n", 1.0),
        ("#41#42", 1.0),
        ("#42#41", 0.0),
        ("#42.0", 0.0),
        ("#042", 0.0),
        ("42", 0.0),  # no marker
        ("42#", 0.0),
        ("", 0.0),
        ("so\n#### 42", 1.0),
    ],
)
def test_the_text_behind_the_last_marker_must_be_equal(text, value):
    assert score(text) == value


def test_without_a_marker_the_whole_completion_is_the_answer():
    assert score(" 42\n", marker="") == 1.0
    assert score("it is 42", marker="") == 0.0


def test_tags_mark_beginning_and_end():
    settings = {"marker": "<answer>", "end_marker": "</answer>"}
    assert score("<think>41?</think><answer>\n42\n</answer>", **settings) == 1.0
    assert score("<answer>42", **settings) == 0.0


def test_a_worked_solution_in_the_data_is_read_like_a_completion():
    assert score("#### 42", answer="6 * 7 = 42\n#### 42") == 1.0


def test_other_types_in_the_data_are_compared_as_text():
    assert score("#42", answer=42) == 1.0


def test_a_row_without_an_answer_is_not_applicable():
    assert score("#42", answer=None) is None


def test_a_blank_answer_matches_nothing():
    assert score("#", answer="") == 0.0


def test_normalised_answers_differ_neither_in_case_nor_in_spacing():
    assert score("#  New   york.", answer="New York", normalise=True) == 1.0
    assert score("#  New   york.", answer="New York") == 0.0


def test_the_scores_are_settings():
    assert score("#42", correct=2.0, incorrect=-1.0) == 2.0
    assert score("#41", correct=2.0, incorrect=-1.0) == -1.0


def test_the_vote_is_the_extracted_answer():
    reward = ExactAnswer()
    assert reward.answer(completion("so # 42 ")) == "42"
    assert reward.answer(completion("so 42")) is None


def test_a_missing_column_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="'solution'"):
        score("#42", column="solution")


@pytest.mark.parametrize("marker", ["#", "####", "<answer>", ""])
def test_a_marker_survives_a_configuration_although_yaml_has_comments(marker):
    parser = ArgumentParser()
    parser.add_argument("--reward", type=ExactAnswer)
    parsed = parser.parse_string(f"reward: {{class_path: ExactAnswer, init_args: {{marker: '{marker}'}}}}")
    assert parsed.reward.init_args.marker == marker
    assert parser.parse_string(parser.dump(parsed)).reward.init_args.marker == marker


@pytest.mark.parametrize("key", ["marker", "end_marker"])
def test_a_marker_that_was_read_as_a_comment_is_an_error_that_says_where_to_write_it(key):
    with pytest.raises(ConfigurationError, match="YAML file") as caught:
        ExactAnswer(**{key: None})
    assert len(str(caught.value).splitlines()) <= 3
