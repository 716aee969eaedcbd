import asyncio
import os

import pytest
from reward_functions import (
    fails_on_five,
    hangs_on_five,
    logs_too,
    matches_answer,
    matches_answer_in_chat,
    needs_solution,
    own_pid,
    returns_too_many,
    share_of_longest,
    slow_judge,
    takes_two,
)

from grpo_lightning.rewards import FunctionReward, score_rollout
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt


def completion(text):
    return Completion(
        token_ids=tuple(map(ord, text)),
        sampler_logprobs=(-0.5,) * len(text),
        text=text,
        finish_reason=FinishReason.EOS,
    )


PLAIN = [
    Prompt(index=0, token_ids=(1,), text="1+1=", columns={"answer": "2", "level": 1}),
    Prompt(index=1, token_ids=(1,), text="2+2=", columns={"answer": "4", "level": 2}),
]
CHAT = [
    Prompt(
        index=prompt.index,
        token_ids=prompt.token_ids,
        text=prompt.text,
        messages=({"role": "user", "content": prompt.text},),
        columns=prompt.columns,
    )
    for prompt in PLAIN
]
COMPLETIONS = [completion("2"), completion("five")]


def values(function, prompts=PLAIN, **settings):
    reward = FunctionReward(function, **settings)
    try:
        return score_rollout([reward], prompts, COMPLETIONS)
    finally:
        reward.close()


def test_a_function_written_for_trl_runs_unchanged():
    assert values(matches_answer).totals_B.tolist() == [1.0, 0.0]


def test_conversations_are_given_as_messages():
    seen = {}

    def look(**kwargs):
        seen.update(kwargs)
        return [0.0, 0.0]

    values(look, CHAT)
    assert seen["prompts"] == [[{"role": "user", "content": "1+1="}], [{"role": "user", "content": "2+2="}]]
    assert seen["completions"][1] == [{"role": "assistant", "content": "five"}]
    assert values(matches_answer_in_chat, CHAT).totals_B.tolist() == [1.0, 0.0]


def test_a_function_with_any_keywords_gets_the_documented_ones():
    seen = {}

    def look(**kwargs):
        seen.update(kwargs)
        return [0.0, 0.0]

    values(look)
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "answer", "level"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    assert seen["prompts"] == ["1+1=", "2+2="]
    assert seen["completions"] == ["2", "five"]
    assert seen["completion_ids"] == [[50], [102, 105, 118, 101]]
    assert seen["answer"] == ["2", "4"]
    assert seen["level"] == [1, 2]


def test_a_function_gets_only_what_its_signature_names():
    assert values(takes_two).totals_B.tolist() == [1.0, 4.0]


def test_a_function_that_logs_runs_and_none_means_not_applicable():
    rewards = values(logs_too)
    assert rewards.valid_B.tolist() == [False, True]
    assert not rewards.failed_BK.any()


def test_an_async_function_is_awaited():
    assert values(slow_judge).totals_B.tolist() == [1.0, 4.0]


def test_an_async_function_is_awaited_where_an_event_loop_runs_already():
    async def notebook():
        return values(slow_judge).totals_B.tolist()

    assert asyncio.run(notebook()) == [1.0, 4.0]


def test_the_progress_of_the_trainer_is_given():
    class Trainer:
        global_step, max_steps, current_epoch = 3, 10, 0

    def progress(completions, trainer_state):
        return [trainer_state.global_step / trainer_state.max_steps for _ in completions]

    reward = FunctionReward(progress)
    reward.setup(Trainer(), None, "fit")
    assert reward.score(PLAIN, COMPLETIONS) == [0.3, 0.3]


def test_a_column_that_a_row_lacks_is_none_there():
    rows = [PLAIN[0], Prompt(index=1, token_ids=(1,), text="", columns={})]
    assert FunctionReward(lambda completions, answer: answer, name="x").score(rows, COMPLETIONS) == ["2", None]


def test_an_argument_that_nothing_provides_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match=r"(?s)'needs_solution'.*'solution'.*answer, level") as caught:
        values(needs_solution)
    assert len(str(caught.value).splitlines()) <= 3


def test_the_name_is_the_functions_unless_another_is_given():
    assert FunctionReward(takes_two).name == "takes_two"
    assert FunctionReward(takes_two, name="mine").name == "mine"


def test_a_dotted_path_names_the_function(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def brevity(completions):\n    return [-1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert values("my_own_rewards.brevity").totals_B.tolist() == [-1.0, -1.0]
    isolated = values("my_own_rewards.brevity", isolate=True, num_workers=1)
    assert isolated.totals_B.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("path", ["no_such_module.brevity", "math.no_such_function", "brevity", "math.pi"])
def test_a_wrong_path_is_a_configuration_error(path):
    with pytest.raises(ConfigurationError, match=r"FunctionReward\.function"):
        FunctionReward(path)


def test_a_failure_on_one_completion_leaves_the_other_its_score():
    rewards = values(fails_on_five)
    assert rewards.failed_BK[:, 0].tolist() == [False, True]
    assert rewards.totals_B[0] == 1.0


@pytest.mark.parametrize(
    ("function", "totals", "failed"),
    [
        (matches_answer, [1.0, 0.0], [False, False]),
        (logs_too, [None, 0.5], [False, False]),
        (fails_on_five, [1.0, None], [False, True]),
        (slow_judge, [1.0, 4.0], [False, False]),
    ],
)
def test_isolated_functions_score_as_in_the_process_itself(function, totals, failed):
    if function is logs_too:  # it returns two scores whatever it is given, which isolation calls one by one
        isolated = values(function, isolate=True, pointwise=False)
    else:
        isolated = values(function, isolate=True, num_workers=1)
    assert isolated.failed_BK[:, 0].tolist() == failed
    assert [None if total != total else total for total in isolated.totals_B.tolist()] == totals


def test_a_timeout_is_a_failure_or_a_score_as_its_author_says():
    excluded = values(hangs_on_five, isolate=True, timeout_seconds=0.3, num_workers=1)
    assert excluded.failed_BK[:, 0].tolist() == [False, True]
    assert excluded.totals_B[0] == 1.0
    scored = values(hangs_on_five, isolate=True, timeout_seconds=0.3, on_timeout=-0.5, num_workers=1)
    assert scored.totals_B.tolist() == [1.0, -0.5]
    assert not scored.failed_BK.any()


def test_the_score_of_a_timeout_is_not_given_to_other_failures():
    rewards = values(fails_on_five, isolate=True, timeout_seconds=60.0, on_timeout=-0.5, num_workers=1)
    assert rewards.failed_BK[:, 0].tolist() == [False, True]


@pytest.mark.parametrize("end", ["teardown", "exception"])
def test_no_process_is_left_when_a_run_ends(end):
    reward = FunctionReward(own_pid, isolate=True, num_workers=1)
    pid = int(reward.score(PLAIN, COMPLETIONS)[0])
    assert os.path.exists(f"/proc/{pid}")
    if end == "teardown":
        reward.teardown(None, None, "fit")
    else:
        reward.on_exception(None, None, KeyboardInterrupt())
    assert not os.path.exists(f"/proc/{pid}")


def test_a_function_that_compares_completions_sees_all_of_them_in_isolation():
    rewards = values(share_of_longest, isolate=True, pointwise=False, num_workers=1)
    assert rewards.totals_B.tolist() == [0.25, 1.0]


def test_a_wrong_number_of_values_stops_the_run_in_isolation_too():
    with pytest.raises(ConfigurationError, match="expected 1 values, got 3"):
        values(returns_too_many, isolate=True, num_workers=1)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"timeout_seconds": 1.0}, "isolate"),
        ({"on_timeout": 0.0}, "isolate"),
        ({"isolate": True, "on_timeout": 0.0}, "timeout_seconds"),
        ({"isolate": True, "timeout_seconds": 0.0}, "timeout_seconds"),
        ({"isolate": True, "timeout_seconds": 1.0, "on_timeout": "skip"}, "on_timeout"),
        ({"isolate": True, "timeout_seconds": 1.0, "on_timeout": float("nan")}, "on_timeout"),
        ({"isolate": True, "num_workers": 0}, "num_workers"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(settings, key):
    with pytest.raises(ConfigurationError, match=key):
        FunctionReward(takes_two, **settings)


def test_a_function_without_an_importable_name_cannot_be_isolated():
    with pytest.raises(ConfigurationError, match="top level"):
        FunctionReward(lambda completions: [0.0], isolate=True)
