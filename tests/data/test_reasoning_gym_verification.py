import pytest

pytest.importorskip("reasoning_gym")

from grpo_lightning.data import ReasoningGym, reasoning_gym_verification
from grpo_lightning.data.reasoning_gym_verification import verify_answer


def call(task="chain_sum", task_config=None, **changes):
    """What the reward sends for the first task of a data set, with its true answer."""
    row = ReasoningGym(task, task_config, num_train=1, num_validation=0).rows("train")[0]
    entry = {name: row[name] for name in ("question", "answer", "metadata")}
    return {"entry": entry, "task": task, "task_config": task_config or {}, "answer": row["answer"], **changes}


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "word_sorting", "countdown", "n_queens"])
def test_the_true_answer_is_worth_one(task):
    assert verify_answer(**call(task)) == [1.0]


@pytest.mark.parametrize("answer", [None, "", "no number", "-999999"])
def test_a_wrong_answer_is_worth_less(answer):
    assert verify_answer(**call(answer=answer))[0] < 0.1


def test_an_answer_that_the_verifier_chokes_on_is_worth_nothing(monkeypatch):
    # The true answer can be read, so it is the answer's fault.
    verifier = Verifier(readable={"4"})
    monkeypatch.setattr(reasoning_gym_verification, "_verifier", lambda task, config: verifier)
    assert verify_answer(entry={"answer": "4"}, task="", task_config={}, answer="([") == [0.0]
    assert verify_answer(entry={"answer": "4"}, task="", task_config={}, answer="4") == [1.0]


def test_a_broken_verifier_is_no_verdict_on_the_answer(monkeypatch):
    monkeypatch.setattr(reasoning_gym_verification, "_verifier", lambda task, config: Verifier(readable=set()))
    with pytest.raises(SyntaxError):
        verify_answer(entry={"answer": "4"}, task="", task_config={}, answer="4")


def test_a_verifier_is_built_once_for_each_task_and_config(monkeypatch):
    import reasoning_gym

    built = []
    create = reasoning_gym.create_dataset
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda *a, **k: built.append((a, k)) or create(*a, **k))
    reasoning_gym_verification._verifier.cache_clear()
    calls = [call(), call(task_config={"max_terms": 3}), call("leg_counting")]
    built.clear()
    for _ in range(2):
        for arguments in calls:
            verify_answer(**arguments)
    assert [(names, settings.get("max_terms")) for names, settings in built] == [
        (("chain_sum",), None),
        (("chain_sum",), 3),
        (("leg_counting",), None),
    ]


class Verifier:
    """Scores the answers that it can read."""

    def __init__(self, readable):
        self.readable = readable

    def score_answer(self, answer, entry):
        if answer not in self.readable:
            raise SyntaxError(answer)
        return 1.0
