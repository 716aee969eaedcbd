import pytest

pytest.importorskip("reasoning_gym")

from grpo_lightning.callbacks.reasoning_gym import ReasoningGymScore
from grpo_lightning.data import ReasoningGym
from grpo_lightning.rewards import score_rollout
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt

ENTRY = {
    "question": "4 + 3 =",
    "answer": "7",
    "metadata": {},
    "task": "chain_sum",
    "task_config": {},
}


def completion(text):
    return Completion(token_ids=(1,), sampler_logprobs=(0.0,), text=text, finish_reason=FinishReason.EOS)


def prompt(**changes):
    return Prompt(index=3, token_ids=(1,), text="", columns={**ENTRY, **changes})


@pytest.fixture(scope="module")
def reward():
    reward = ReasoningGymScore(num_workers=1)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 1.0),
        (" 7\n", 1.0),
        ("8", 0.0),
        ("", 0.0),
        ("It is <answer>7</answer>.", 1.0),
        ("<answer>8</answer> no, <answer>\n7 </answer>", 1.0),  # the last one counts
        ("<answer>7</answer><answer>8</answer>", 0.0),
        ("7 <answer></answer>", 0.0),
        ("<answer>7", 1 / 9),  # without both tags the whole text counts, of which the answer is one of nine characters
    ],
)
def test_scores_by_hand(reward, text, value):
    (score,) = reward.score([prompt()], [completion(text)])
    # chain_sum gives 0.01 for an answer that it can read and that is wrong.
    assert score == pytest.approx(value, abs=0.011)


def test_every_task_is_judged_by_its_own_verifier(reward):
    prompts, texts = [], []
    for task in ("chain_sum", "leg_counting", "word_sorting"):
        row = ReasoningGym(task, num_train=1, num_validation=0).rows("train")[0]
        prompts += [Prompt(index=0, token_ids=(1,), text="", columns=row)] * 2
        texts += [row["answer"], "-1"]
    scores = reward.score(prompts, [completion(text) for text in texts])
    assert scores[::2] == [1.0, 1.0, 1.0]
    assert max(scores[1::2]) < 0.1


@pytest.mark.parametrize(
    ("text", "answer"), [("<answer> 7 </answer>", "7"), ("seven", "seven"), ("<answer> </answer>", None), ("", None)]
)
def test_completions_vote_with_what_is_judged(reward, text, answer):
    assert reward.answer(completion(text)) == answer


def test_a_row_of_other_data_is_a_mistake_that_names_the_column(reward):
    other = Prompt(index=3, token_ids=(1,), text="", columns={"answer": "7"})
    with pytest.raises(ConfigurationError, match="reads the column 'question', which row 3 of the data does not have"):
        reward.score([other], [completion("7")])


def test_a_verifier_that_cannot_be_had_is_a_failure_and_no_zero(reward):
    rewards = score_rollout([reward], [prompt(task="no_such_task")] * 2, [completion("7"), completion("x")])
    assert rewards.failed_BK.all()
    assert reward.first_failure is not None


def test_it_scores_again_after_it_was_closed():
    reward = ReasoningGymScore(num_workers=1)
    for _ in range(2):
        assert reward.score([prompt()], [completion("7")]) == [1.0]
        reward.close()


@pytest.mark.parametrize("settings", [{"timeout_seconds": 0.0}, {"on_timeout": "zero"}, {"num_workers": 0}])
def test_a_setting_out_of_its_range_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        ReasoningGymScore(**settings)
