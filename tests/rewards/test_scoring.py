import logging
import math
from fractions import Fraction

import pytest
import torch

from grpo_lightning.rewards import RewardCallback, RewardFailureError, check_failure_rate, find_rewards, score_rollout
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt, StepScores


def prompt(index=0, **columns):
    return Prompt(index=index, token_ids=(1,), text=f"question {index}", columns=columns)


def completion(text, num_tokens=4):
    return Completion(
        token_ids=(7,) * num_tokens, sampler_logprobs=(-0.5,) * num_tokens, text=text, finish_reason=FinishReason.EOS
    )


class Table(RewardCallback):
    """Looks a completion's score up by its text; an exception there is raised."""

    def __init__(self, table, name="table", weight=1.0):
        super().__init__(name, weight)
        self.table = table
        self.num_calls = 0

    def score(self, prompts, completions):
        self.num_calls += 1
        scores = [self.table[completion.text] for completion in completions]
        for score in scores:
            if isinstance(score, Exception):
                raise score
        return scores


class Returns(RewardCallback):
    """Returns a given object, whatever the completions."""

    def __init__(self, result, name="returns"):
        super().__init__(name)
        self.result = result

    def score(self, prompts, completions):
        return self.result


def score(rewards, texts):
    return score_rollout(rewards, [prompt()] * len(texts), [completion(text) for text in texts])


def test_not_applicable_a_failure_and_zero_are_three_things():
    accuracy = Table({"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}, name="accuracy")
    style = Table({"a": 0.5, "b": None, "c": math.nan, "d": 0.0}, name="style", weight=2.0)
    rewards = score([accuracy, style], "abcd")
    assert rewards.names == ("accuracy", "style")
    # a: 1 + 2*0.5 = 2    b: style does not apply: 0    c: style failed: excluded    d: 0 + 2*0 = 0
    assert rewards.failed_BK.tolist() == [[False, False], [False, False], [False, True], [False, False]]
    assert rewards.valid_B.tolist() == [True, True, False, True]
    assert rewards.totals_B[rewards.valid_B].tolist() == [2.0, 0.0, 0.0]
    assert rewards.values_BK.dtype == torch.float64
    assert rewards.values_BK[1, 1].isnan()


def test_a_completion_to_which_no_reward_applies_is_not_valid_and_no_failure():
    rewards = score([Table({"a": None, "b": 1.0})], "ab")
    assert rewards.valid_B.tolist() == [False, True]
    assert not rewards.failed_BK.any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, ValueError("no"), TypeError("no"), KeyError("no")])
def test_a_failure_on_one_completion_changes_nothing_for_the_others(broken):
    sound = {"a": 0.25, "b": 1.0, "c": None, "d": -3.0}
    expected = score([Table(sound)], "abcd")
    rewards = score([Table({**sound, "b": broken})], "abcd")
    others = [0, 2, 3]
    assert rewards.failed_BK[:, 0].tolist() == [False, True, False, False]
    torch.testing.assert_close(
        rewards.values_BK[others], expected.values_BK[others], rtol=0.0, atol=0.0, equal_nan=True
    )


def test_which_completions_fail_does_not_depend_on_the_split_over_ranks():
    table = {"a": 1.0, "b": ValueError(), "c": 0.0, "d": 0.5}
    whole = score([Table(table)], "abcd")
    halves = [score([Table(table)], part) for part in ("ab", "cd")]
    assert torch.cat([half.failed_BK for half in halves]).equal(whole.failed_BK)
    assert torch.cat([half.totals_B for half in halves]).nan_to_num(9.0).equal(whole.totals_B.nan_to_num(9.0))


def test_a_reward_that_compares_completions_fails_as_a_whole():
    reward = Table({"a": 1.0, "b": ValueError()})
    reward.pointwise = False
    assert score([reward], "aab").failed_BK.all()
    assert reward.num_calls == 1


def test_a_sound_reward_is_called_once_for_all_completions():
    reward = Table({"a": 1.0, "b": 0.0})
    score([reward], "abab")
    assert reward.num_calls == 1


def test_only_the_first_traceback_is_shown(caplog):
    reward = Table({"a": ValueError("the judge is out"), "b": math.nan, "c": 1.0})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            score([reward], "abc")
    assert len(caplog.records) == 1
    shown = caplog.records[0].getMessage()
    assert "'table' (Table)" in shown
    assert "Traceback" in shown
    assert "ValueError: the judge is out" in shown
    assert reward.first_failure in shown


def test_a_value_that_is_not_finite_is_shown_with_its_completion(caplog):
    score([Table({"my text": math.inf})], ["my text"])
    assert "It returned inf for the completion 'my text'" in caplog.text


def test_step_scores_count_with_their_sum_and_are_kept():
    steps = StepScores((1.0, 0.5), (1, 3))
    rewards = score([Table({"a": steps, "b": None}), Table({"a": 1.0, "b": 0.0}, name="plain")], "ab")
    assert rewards.values_BK[0].tolist() == [1.5, 1.0]
    assert rewards.steps == {"table": (steps, None)}


@pytest.mark.parametrize(
    "steps",
    [
        StepScores((1.0,), (4,)),  # the completion has tokens 0..3
        StepScores((1.0,), (-1,)),
        StepScores((1.0, 1.0), (2, 2)),
        StepScores((1.0, 1.0), (3, 1)),
        StepScores((1.0,), (1, 3)),
        StepScores((), ()),
    ],
)
def test_steps_that_end_outside_or_out_of_order_stop_the_run(steps):
    with pytest.raises(ConfigurationError, match=r"(?s)'table' \(Table\).*StepScores.*0\.\.3"):
        score([Table({"a": steps})], "a")


def test_a_step_score_that_is_not_a_number_is_a_failure():
    assert score([Table({"a": StepScores((math.nan,), (3,))})], "a").failed_BK.all()


@pytest.mark.parametrize(
    ("result", "got"),
    [
        ([1.0], "expected 2 values, got 1"),
        ([1.0, 1.0, 1.0], "expected 2 values, got 3"),
        ("ab", "list of 2 scores, got str 'ab'"),
        (1.0, "list of 2 scores, got float 1.0"),
        (None, "list of 2 scores, got NoneType None"),
        ({"a": 1.0, "b": 2.0}, "list of 2 scores, got dict"),
        (["1", "0"], "number, StepScores or None .* got str '1'"),
        ([[1.0], [0.0]], "number, StepScores or None .* got list"),
        ([torch.zeros(2), torch.zeros(2)], "number, StepScores or None .* got Tensor"),
    ],
)
def test_what_is_no_list_of_scores_stops_the_run_and_names_the_reward(result, got):
    with pytest.raises(ConfigurationError, match=f"(?s)'returns' \\(Returns\\).*{got}") as caught:
        score([Returns(result)], "ab")
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "result",
    [
        (1.0, 0.0),
        [True, False],
        [1, 0],
        [Fraction(1), Fraction(0)],
        torch.tensor([1.0, 0.0]),
        torch.tensor([1.0, 0.0]).numpy(),
        [torch.tensor(1.0), torch.tensor(0.0)],
        (float(value) for value in (1, 0)),
    ],
)
def test_numbers_of_every_kind_are_scores(result):
    assert score([Returns(result)], "ab").totals_B.tolist() == [1.0, 0.0]


def test_no_completions_give_no_rewards():
    rewards = score_rollout([Table({})], [], [])
    assert rewards.values_BK.shape == (0, 1)


def test_rewards_are_found_in_their_order_among_other_callbacks():
    first, second = Table({}, name="first"), Table({}, name="second")
    assert find_rewards([object(), second, object(), first]) == [second, first]


def test_no_reward_is_an_error_that_names_the_key():
    with pytest.raises(ConfigurationError, match=r"trainer\.callbacks"):
        find_rewards([object()])


def test_two_rewards_of_one_name_are_an_error_that_names_both():
    with pytest.raises(ConfigurationError, match=r"trainer\.callbacks: Table and Returns .*'same'"):
        find_rewards([Table({}, name="same"), Returns([], name="same")])


def test_an_abstract_reward_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        RewardCallback("abstract")


@pytest.mark.parametrize(("name", "weight"), [("", 1.0), ("a/b", 1.0), ("a", math.nan), ("a", math.inf)])
def test_a_bad_name_or_weight_is_an_error(name, weight):
    with pytest.raises(ConfigurationError):
        Table({}, name=name, weight=weight)


def test_a_missing_column_is_named_with_those_that_are_there():
    with pytest.raises(ConfigurationError, match=r"(?s)'answer', which row 17 .* not have.*'solution'"):
        Table({}).read_column(prompt(17, solution="4"), "answer")


def test_failures_up_to_the_limit_are_accepted():
    check_failure_rate([Table({})], [10], 100, 0.1)
    check_failure_rate([Table({})], [0], 0, 0.0)


def test_more_failures_than_the_limit_stop_the_run_with_a_diagnosis():
    sound, broken = Table({}, name="sound"), Table({"a": ValueError("the judge is out")}, name="broken")
    score([broken], "a")
    with pytest.raises(
        RewardFailureError, match=r"(?s)'broken' \(Table\).* 11 of 100 .*11\.0%.*judge is out"
    ) as caught:
        check_failure_rate([sound, broken], [0, 11], 100, 0.1)
    assert "model.max_failure_rate" in str(caught.value)


@pytest.mark.parametrize(
    "score", [1e308, -1e31, 10**400, StepScores((1e308, 1e308), (0, 1)), StepScores((float("inf"), 1.0), (0, 1))]
)
def test_a_score_that_sums_would_overflow_on_is_a_failure(score):
    rewards = score_rollout([Table({"a": score, "b": 1.0})], [prompt(0), prompt(1)], [completion("a"), completion("b")])
    assert rewards.failed_BK.tolist() == [[True], [False]]
    assert rewards.values_BK[1, 0] == 1.0


@pytest.mark.parametrize("rate", [-1.0, 1.5, float("nan")])
def test_a_limit_that_is_no_share_is_refused_by_key(rate):
    with pytest.raises(ConfigurationError, match=r"model\.max_failure_rate must be in \[0, 1\]"):
        check_failure_rate([Table({})], [0], 100, rate)


def test_a_missing_column_is_named_with_the_place_of_its_row():
    row = Prompt(index=16, token_ids=(1,), text="question", place="train.jsonl:17")
    with pytest.raises(ConfigurationError, match=r"which train\.jsonl:17 does not have"):
        Table({}).read_column(row, "answer")
