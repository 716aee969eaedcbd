"""Reward functions as users write them, in a file of their own that imports nothing of ours."""

import asyncio
import os
import subprocess
import sys


def act(action, value=None):
    """What a reward function may do, called in a worker."""
    if action == "loop":
        while True:
            pass
    if action == "exit":
        os._exit(3)
    if action == "abort":
        os.abort()
    if action == "raise":
        raise ValueError(value)
    if action == "sys.exit":
        sys.exit(0)
    if action == "print":
        print("printed by a reward")
    if action == "big":
        return "x" * value
    if action == "unpicklable":
        return lambda: None
    if action == "pid":
        return os.getpid()
    if action == "child":
        return subprocess.Popen(["sleep", "600"]).pid
    return value


def matches_answer(prompts, completions, answer, **kwargs):
    return [1.0 if text == expected else 0.0 for text, expected in zip(completions, answer, strict=True)]


def matches_answer_in_chat(completions, answer, **kwargs):
    texts = [messages[0]["content"] for messages in completions]
    return [1.0 if text == expected else 0.0 for text, expected in zip(texts, answer, strict=True)]


def logs_too(completions, log_extra=None, log_metric=None, trainer_state=None, **kwargs):
    log_extra("text", completions)
    log_metric("share", 0.5)
    assert trainer_state is None
    return [None, 0.5]


def takes_two(completions, answer):
    return [float(len(text)) for text in completions]


async def slow_judge(completions, **kwargs):
    async def judge(text):
        await asyncio.sleep(0.001)
        return float(len(text))

    return await asyncio.gather(*(judge(text) for text in completions))


def needs_solution(completions, solution):
    return [0.0 for _ in completions]


def fails_on_five(completions, **kwargs):
    if "five" in completions:
        raise ValueError("five is no digit")
    return [1.0 for _ in completions]


def hangs_on_five(completions, **kwargs):
    while "five" in completions:
        pass
    return [1.0 for _ in completions]


def returns_too_many(completions, **kwargs):
    return [1.0, 2.0, 3.0]


def share_of_longest(completions, **kwargs):
    longest = max(map(len, completions))
    return [len(text) / longest for text in completions]


def own_pid(completions):
    return [os.getpid() for _ in completions]
