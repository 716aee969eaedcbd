"""Evaluation: what is drawn, how it is judged, and that its metrics are exact over any split of the prompts."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from grpo_lightning.evaluation import (
    BatchEvaluation,
    Evaluation,
    EvaluationMetrics,
    Scored,
    evaluate_batch,
)
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rollout import RolloutEngine
from grpo_lightning.types import (
    Completion,
    ConfigurationError,
    Coordinates,
    EvaluationPrompt,
    FinishReason,
    Prompt,
    Rewards,
    SamplingParams,
    Stream,
)

NAN = float("nan")
TRAINING = SamplingParams(max_new_tokens=8, min_new_tokens=3, stop=("!",))
COORDINATES = Coordinates(seed=5, stream=Stream.VALIDATION, iteration=0)


def completion(text: str, *, length: int = 1, truncated: bool = False) -> Completion:
    reason = FinishReason.LENGTH if truncated else FinishReason.EOS
    return Completion(token_ids=(0,) * length, sampler_logprobs=(0.0,) * length, text=text, finish_reason=reason)


def rewards(*columns: Sequence[float], names: Sequence[str] = ("right",), failed: Sequence[Sequence[bool]] = ()):
    values_BK = torch.tensor(columns, dtype=torch.float64).T
    failed_BK = torch.tensor(failed, dtype=torch.bool).T if failed else torch.zeros_like(values_BK, dtype=torch.bool)
    return Rewards(names=tuple(names), weights=(1.0,) * len(names), values_BK=values_BK, failed_BK=failed_BK)


def prompts(number: int) -> list[EvaluationPrompt]:
    return [
        EvaluationPrompt(i, Prompt(index=i, token_ids=(i,), text=str(i), columns={"answer": "a"}))
        for i in range(number)
    ]


class Recorder(RolloutEngine):
    """Answers "a" greedily; sample s of slot p is "a" where s < p, else "b". Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def setup(self, model, tokenizer, eos_token_ids) -> None: ...

    def update_weights(self, named_tensors, version) -> None: ...

    def generate(self, requests, sampling, coordinates):
        self.asked.append((list(requests), sampling, coordinates))
        greedy = sampling.temperature == 0
        return [
            completion("a" if greedy or s < r.slot else "b", length=1 + r.slot, truncated=r.slot == 0)
            for r in requests
            for s in range(r.num_completions)
        ]


class Right(RewardCallback):
    def __init__(self) -> None:
        super().__init__(name="right")

    def score(self, prompts, completions):
        return [float(c.text == p.columns["answer"]) for p, c in zip(prompts, completions, strict=True)]


def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Rewards:
    return rewards(Right().score(prompts, completions))


def measured(evaluation: Evaluation, batch: list[EvaluationPrompt], engine: RolloutEngine) -> EvaluationMetrics:
    metrics = EvaluationMetrics(evaluation)
    metrics.evaluate(batch, engine=engine, sampling=TRAINING, coordinates=COORDINATES, score=score, rewards=[Right()])
    return metrics


def test_greedy_and_samples_are_drawn_as_the_settings_say() -> None:
    engine = Recorder()
    evaluation = Evaluation(num_samples=4, temperature=0.7, top_k=9, top_p=0.9, max_new_tokens=2)
    result = evaluate_batch(
        prompts(3),
        evaluation=evaluation,
        engine=engine,
        sampling=TRAINING,
        coordinates=COORDINATES,
        score=score,
    )
    (greedy, how_greedy, where), (samples, how_sampled, where_too) = engine.asked
    assert [(r.slot, r.num_completions) for r in greedy] == [(0, 1), (1, 1), (2, 1)]
    assert [(r.slot, r.num_completions) for r in samples] == [(0, 4), (1, 4), (2, 4)]
    assert how_greedy == SamplingParams(temperature=0.0, max_new_tokens=2, min_new_tokens=2, stop=("!",))
    assert how_sampled == replace(how_greedy, temperature=0.7, top_k=9, top_p=0.9)
    assert where == where_too == COORDINATES
    assert result.num_prompts == 3
    assert (len(result.greedy.completions), len(result.samples.completions)) == (3, 12)


def test_evaluation_is_as_long_as_training_unless_told_otherwise() -> None:
    assert Evaluation().greedily(TRAINING) == replace(TRAINING, temperature=0.0)


def test_metrics_worked_by_hand() -> None:
    # Slots 0, 1, 2 of 4 samples: c = 0, 1, 2 correct. Greedy all correct, lengths 1, 2, 3, slot 0 truncated.
    # pass@1 = mean(0, 1/4, 2/4); pass@2 = mean(0, 1 - C(3,2)/C(4,2), 1 - C(2,2)/C(4,2)) = mean(0, 1/2, 5/6).
    # maj@3 of votes (a b b b): b always. Of (a a b b): 3 of them have a majority of a in 2 of the 4 subsets.
    evaluation = Evaluation(num_samples=4, pass_at=(2,), majority_at=(3,))
    values = measured(evaluation, prompts(3), Recorder()).compute()
    expected = {
        "accuracy": 1.0,
        "pass@1": (0 + 1 / 4 + 2 / 4) / 3,
        "pass@2": (0 + 1 / 2 + 5 / 6) / 3,
        "maj@3": (0 + 0 + 1 / 2) / 3,
        "reward/mean": 1.0,
        "length_mean": 2.0,
        "truncation_ratio": 1 / 3,
        "failure_ratio": 0.0,
        "num_prompts": 3.0,
    }
    assert {name: float(value) for name, value in values.items()} == pytest.approx(expected, abs=1e-15)


def test_without_greedy_completions_the_samples_are_described() -> None:
    engine = Recorder()
    values = measured(Evaluation(greedy=False, num_samples=2), prompts(2), engine).compute()
    assert len(engine.asked) == 1
    assert "accuracy" not in values
    assert values["reward/mean"] == 1 / 4  # slot 1's first sample
    assert values["truncation_ratio"] == 1 / 2


def test_batches_of_any_size_give_the_same_metrics() -> None:
    evaluation = Evaluation(num_samples=4, pass_at=(2, 4), majority_at=(1, 4))
    whole = measured(evaluation, prompts(7), Recorder()).compute()
    pieces = EvaluationMetrics(evaluation)
    for batch in (prompts(7)[:1], [], prompts(7)[1:6], prompts(7)[6:]):
        pieces.evaluate(
            batch, engine=Recorder(), sampling=TRAINING, coordinates=COORDINATES, score=score, rewards=[Right()]
        )
    for name, value in pieces.compute().items():
        assert value == pytest.approx(float(whole[name]), abs=1e-15), name


def test_an_empty_batch_asks_nothing_and_counts_nothing() -> None:
    engine = Recorder()
    values = measured(Evaluation(num_samples=2), [], engine).compute()
    assert engine.asked == []
    assert values["num_prompts"] == 0
    assert values["accuracy"].isnan()


def test_a_failed_reward_counts_nowhere_and_is_counted() -> None:
    judged = rewards([1.0, NAN, 0.0], failed=[[False, True, False]])
    metrics = EvaluationMetrics(Evaluation())
    texts = [completion("x") for _ in range(3)]
    metrics.update(BatchEvaluation(num_prompts=3, greedy=Scored(texts, judged), samples=None))
    values = metrics.compute()
    assert values["accuracy"] == 1 / 2
    assert values["reward/mean"] == 1 / 2
    assert values["failure_ratio"] == 1 / 3


def test_failed_samples_leave_their_prompt_fewer_samples() -> None:
    # Prompt 0: samples right, failed, wrong: n=2, c=1, pass@2 = 1. Prompt 1: two failed: n=1 < 2, not estimated.
    judged = rewards([1.0, NAN, 0.0, 1.0, NAN, NAN], failed=[[False, True, False, False, True, True]])
    metrics = EvaluationMetrics(Evaluation(greedy=False, num_samples=3, pass_at=(2,)))
    metrics.update(BatchEvaluation(num_prompts=2, greedy=None, samples=Scored([completion("x")] * 6, judged)))
    values = metrics.compute()
    assert values["pass@1"] == (1 / 2 + 1) / 2
    assert values["pass@2"] == 1.0


def test_the_named_reward_decides_and_not_the_total() -> None:
    judged = rewards([1.0, 0.0, NAN], [0.0, 1.0, 1.0], names=("right", "format"))
    by_name, by_total = Evaluation(correct="right").judge(judged), Evaluation().judge(judged)
    assert by_name.correct_B.tolist() == [True, False, False]
    assert by_name.valid_B.tolist() == [True, True, False]  # it does not apply to the third
    assert by_total.correct_B.tolist() == [True, True, True]


def test_a_total_that_misses_the_threshold_by_rounding_reaches_it() -> None:
    judged = rewards([0.6], [0.3], [0.1], names=("a", "b", "c"))
    assert judged.totals_B.item() < 1.0  # 0.6 + 0.3 + 0.1 in binary
    assert Evaluation(threshold=1.0).judge(judged).correct_B.item()


class Parsing(Right):
    def answer(self, completion: Completion) -> str | None:
        return completion.text[-1]


def test_the_majority_votes_on_the_answers_that_a_reward_reads() -> None:
    # The texts all differ, the answers are 1, 1, 2. The first reward does not say how an answer is read.
    texts = [completion("x1"), completion("y1"), completion("z2")]
    result = BatchEvaluation(num_prompts=1, greedy=None, samples=Scored(texts, rewards([1.0, 1.0, 0.0])))
    metrics = EvaluationMetrics(Evaluation(greedy=False, num_samples=3, majority_at=(3,)))
    metrics.update(result, [Right(), Parsing()])
    assert metrics.compute()["maj@3"] == 1.0
    metrics.reset()
    metrics.update(result, [Right()])
    assert metrics.compute()["maj@3"] == pytest.approx(2 / 3)  # a tie of three texts, two of them right


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": -1}, ["num_samples", ">= 0", "-1"]),
        ({"num_samples": 4, "pass_at": (1, 8)}, ["pass_at", "num_samples = 4", "8"]),
        ({"pass_at": (1,)}, ["pass_at", "num_samples = 0"]),
        ({"num_samples": 4, "majority_at": (0,)}, ["majority_at", "between 1", "0"]),
        ({"temperature": 0.0}, ["temperature", "> 0", "0.0"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"top_p": 1.5}, ["top_p", "1.5"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", ">= 1", "0"]),
        ({"greedy": False}, ["greedy", "num_samples"]),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        Evaluation(**settings)
    message = str(error.value)
    assert all(word in message for word in ["model.evaluation.", *words]), message


def test_an_unknown_reward_is_named_before_anything_is_drawn() -> None:
    Evaluation(correct="right").check_rewards(["right"])
    with pytest.raises(ConfigurationError, match=r"model\.evaluation\.correct.*'wrong'.*\['right'\]"):
        Evaluation(correct="wrong").check_rewards(["right"])


def test_the_metrics_are_no_part_of_a_checkpoint_and_survive_pickling() -> None:
    metrics = measured(Evaluation(), prompts(2), Recorder())
    assert metrics.state_dict() == {}
    assert pickle.loads(pickle.dumps(metrics)).compute()["num_prompts"] == 2


def share_of_rank(rank: int, world_size: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    evaluation = Evaluation(num_samples=4, pass_at=(2,), majority_at=(4,))
    metrics = EvaluationMetrics(evaluation)
    for batch in (prompts(5), prompts(6)[5:]):  # the second batch is empty on rank 0
        mine = [prompt for prompt in batch if prompt.slot % world_size == rank]
        metrics.evaluate(
            mine, engine=Recorder(), sampling=TRAINING, coordinates=COORDINATES, score=score, rewards=[Right()]
        )
    torch.save({name: float(value) for name, value in metrics.compute().items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    multiprocessing.spawn(share_of_rank, args=(2, str(tmp_path)), nprocs=2)
    alone = measured(Evaluation(num_samples=4, pass_at=(2,), majority_at=(4,)), prompts(6), Recorder()).compute()
    expected = {name: float(value) for name, value in alone.items()}
    for rank in range(2):
        assert torch.load(os.fspath(tmp_path / f"{rank}.pt")) == pytest.approx(expected, abs=1e-15)
