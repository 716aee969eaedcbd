import dataclasses
import math

import pytest
import torch

from grpo_lightning.types import Completion, FinishReason, Prompt, Rewards, Rollout, Statistic, Stream

NAN = float("nan")


def completion(finish_reason):
    return Completion(token_ids=(7, 1), sampler_logprobs=(-0.2, -0.1), text="4", finish_reason=finish_reason)


@pytest.mark.parametrize(
    ("finish_reason", "is_truncated"),
    [(FinishReason.EOS, False), (FinishReason.STOP, False), (FinishReason.LENGTH, True)],
)
def test_only_the_length_limit_truncates(finish_reason, is_truncated):
    assert completion(finish_reason).is_truncated == is_truncated


def test_a_completions_prompt_is_its_groups():
    prompts = tuple(Prompt(index=i, token_ids=(i,), text=str(i)) for i in (4, 9))
    rollout = Rollout(iteration=0, slots=(1, 3), prompts=prompts, completions=(completion(FinishReason.EOS),) * 6)
    assert rollout.group_size == 3
    assert [prompt.index for prompt in rollout.completion_prompts] == [4, 4, 4, 9, 9, 9]


def test_no_prompts_are_no_groups():
    empty = Rollout(iteration=0, slots=(), prompts=(), completions=())
    assert (empty.group_size, empty.completion_prompts) == (0, ())


class TestRewards:
    # Rows: both apply; the second does not apply; the second failed; neither applies; all failed.
    VALUES_BK = torch.tensor([[1.0, 0.5], [1.0, NAN], [1.0, NAN], [NAN, NAN], [NAN, NAN]], dtype=torch.float64)
    FAILED_BK = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 0], [1, 1]], dtype=torch.bool)

    @pytest.fixture
    def rewards(self):
        return Rewards(
            names=("accuracy", "format"), weights=(2.0, -1.0), values_BK=self.VALUES_BK, failed_BK=self.FAILED_BK
        )

    def test_a_completion_is_valid_where_no_reward_failed_and_one_applies(self, rewards):
        assert rewards.valid_B.tolist() == [True, True, False, False, False]

    def test_a_total_is_the_weighted_sum_of_the_rewards_that_apply(self, rewards):
        # 2 x 1 - 1 x 0.5; 2 x 1
        assert rewards.totals_B[:2].tolist() == [1.5, 2.0]
        assert rewards.totals_B[2:].isnan().all()
        assert rewards.totals_B.dtype == torch.float64

    def test_the_example_of_the_docstring(self):
        rewards = Rewards(
            names=("accuracy", "format"),
            weights=(1.0, 0.5),
            values_BK=torch.tensor([[1.0, 0.0], [0.0, NAN]], dtype=torch.float64),
            failed_BK=torch.tensor([[False, False], [False, True]]),
        )
        assert rewards.valid_B.tolist() == [True, False]
        first, second = rewards.totals_B.tolist()
        assert first == 1.0
        assert math.isnan(second)

    def test_values_stay_as_they_were(self, rewards):
        before = self.VALUES_BK.clone()
        assert rewards.totals_B is not None
        assert torch.equal(self.VALUES_BK.nan_to_num(9.0), before.nan_to_num(9.0))


def test_streams_never_change_their_numbers():
    # They are coordinates of random numbers: a run is resumed, and reproduced, with the numbers that it began with.
    assert {stream.name: int(stream) for stream in Stream} == {
        "TRAINING": 0,
        "VALIDATION": 1,
        "TEST": 2,
        "PREDICT": 3,
        "PROMPT_ORDER": 4,
        "DATA": 5,
        "STATISTICS": 6,
    }


def test_a_statistic_is_a_sum_and_a_count():
    statistic = Statistic(torch.tensor(6.0), torch.tensor(4.0))
    assert float(statistic.sum / statistic.count) == 1.5


def test_what_flows_between_the_stages_cannot_be_changed_on_the_way():
    with pytest.raises(dataclasses.FrozenInstanceError):
        completion(FinishReason.EOS).text = "5"
