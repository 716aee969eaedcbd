import importlib.util
import threading

import pytest

from grpo_lightning.callbacks.math_answer import MathAnswer
from grpo_lightning.rewards import score_rollout
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def completion(text):
    return Completion(token_ids=(1,), sampler_logprobs=(0.0,), text=text, finish_reason=FinishReason.EOS)


def prompt(answer):
    return Prompt(index=0, token_ids=(1,), text="", columns={"answer": answer})


@pytest.fixture(scope="module")
def reward():
    reward = MathAnswer(num_workers=1)
    yield reward
    reward.close()


CASES = [
    ("72", r"So it is \boxed{72}.", 1.0),
    ("72", r"So it is \boxed{27}.", 0.0),
    ("72", "So it is 72.", 1.0),
    ("72", "", 0.0),
    ("72", "no idea", 0.0),
    (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
    (r"$\frac{1}{2}$", r"\boxed{1/2}", 1.0),
    ("x^2+1", r"\boxed{1 + x^2}", 1.0),
    ("x^2+1", r"\boxed{x^2}", 0.0),
    ("1,234", "1234", 1.0),
    ("2 * 36 = 72\n#### 72", r"\boxed{72}", 1.0),
    ("72", r"<think>\boxed{72}</think> \boxed{1}", 0.0),
    ("72", r"<think>\boxed{1}</think> \boxed{72}", 1.0),
    (72, r"\boxed{72}", 1.0),
    (None, r"\boxed{72}", None),
    ("", r"\boxed{72}", None),
]


@needs_math_verify
def test_answers_are_compared_as_mathematics(reward):
    scores = reward.score([prompt(expected) for expected, _, _ in CASES], [completion(text) for _, text, _ in CASES])
    assert scores == [value for _, _, value in CASES]


@needs_math_verify
def test_it_works_off_the_main_thread(reward):
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(reward.score([prompt("72")], [completion("72")])))
    thread.start()
    thread.join(60)
    assert scores == [1.0]


@needs_math_verify
@pytest.mark.parametrize(("on_timeout", "value", "failed"), [("exclude", None, True), (0.0, 0.0, False)])
def test_an_answer_too_large_to_compute_costs_its_own_completion_alone(on_timeout, value, failed):
    reward = MathAnswer(timeout_seconds=4.0, on_timeout=on_timeout, num_workers=1)
    huge = completion(r"\boxed{9999999^{99999999}}")
    rewards = score_rollout([reward], [prompt("72")] * 3, [completion("72"), huge, completion("71")])
    reward.close()
    assert rewards.failed_BK[:, 0].tolist() == [False, failed, False]
    assert [rewards.totals_B[0], rewards.totals_B[2]] == [1.0, 0.0]
    if value is not None:
        assert rewards.totals_B[1] == value


@needs_math_verify
def test_the_vote_is_the_box_or_else_the_last_number():
    reward = MathAnswer()
    assert reward.answer(completion(r"<think>\boxed{1}</think> 5 or \boxed{ \pi }")) == r"\pi"
    assert reward.answer(completion("it is 1,000")) == "1000"
    assert reward.answer(completion("no idea")) is None


def test_without_math_verify_the_error_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'grpo_lightning\[math\]'"):
        MathAnswer()


@needs_math_verify
@pytest.mark.parametrize("settings", [{"timeout_seconds": 0.0}, {"num_workers": 0}, {"on_timeout": "skip"}])
def test_settings_out_of_range_are_configuration_errors(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        MathAnswer(**settings)
