from grpo_lightning.callbacks.think_format import ThinkFormat
from grpo_lightning.types import Completion, FinishReason


def completion(text):
    return Completion(token_ids=(1,), sampler_logprobs=(0.0,), text=text, finish_reason=FinishReason.EOS)


RIGHT = completion("<think>6 times 7</think>\n<answer>42</answer>")
WRONG = completion("It is <answer>42</answer>")


def test_the_right_form_is_rewarded():
    assert ThinkFormat().score([], [RIGHT, WRONG]) == [1.0, 0.0]
    assert ThinkFormat(correct=0.5, incorrect=-1.0).score([], [RIGHT, WRONG]) == [0.5, -1.0]


def test_the_vote_is_the_answer_of_a_completion_in_the_right_form():
    assert ThinkFormat().answer(RIGHT) == "42"
    assert ThinkFormat().answer(WRONG) is None


def test_the_prompt_may_open_the_thought():
    inside = completion("6 times 7</think><answer>42</answer>")
    assert ThinkFormat(prompt_opens_think=True).score([], [inside, RIGHT]) == [1.0, 0.0]
    assert ThinkFormat().score([], [inside]) == [0.0]
