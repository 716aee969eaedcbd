import logging

import pytest
from lightning.pytorch import LightningModule, Trainer

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, FinishReason


class Constant(RewardCallback):
    """Gives every completion the same, and notes that it was closed."""

    def __init__(self, name="constant", weight=1.0):
        super().__init__(name, weight)
        self.num_closed = 0

    def score(self, prompts, completions):
        return [1.0 for _ in completions]

    def close(self):
        self.num_closed += 1


class Quiet(LightningModule):
    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def validation_step(self, batch, index):
        if self.error:
            raise self.error

    def val_dataloader(self):
        return [1]


def validate(reward, error=None):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    Trainer(accelerator="cpu", callbacks=[reward], enable_model_summary=False, **quiet).validate(Quiet(error))


def completion(text):
    return Completion(token_ids=(1,), sampler_logprobs=(0.0,), text=text, finish_reason=FinishReason.EOS)


def test_two_rewards_of_one_class_have_two_states():
    assert Constant("a").state_key == "Constant[a]"
    assert Constant("a").state_key != Constant("b").state_key


@pytest.mark.parametrize(("text", "answer"), [(" 4\n", "4"), ("", None), ("  ", None)])
def test_the_answer_to_vote_for_is_the_text_without_the_space_around_it(text, answer):
    assert Constant().answer(completion(text)) == answer


def test_a_reward_is_closed_when_a_stage_ends():
    reward = Constant()
    validate(reward)
    assert reward.num_closed == 1


def test_a_reward_is_closed_when_a_run_breaks():
    reward = Constant()
    with pytest.raises(KeyError):
        validate(reward, KeyError("as a bug would"))
    assert reward.num_closed == 1


def test_only_the_first_failure_is_kept_and_shown(caplog):
    reward = Constant()
    with caplog.at_level(logging.WARNING):
        reward.report_failure("first\n")
        reward.report_failure("second")
    assert reward.first_failure == "first"
    assert "first" in caplog.text
    assert "second" not in caplog.text
    assert "The reward 'constant' (Constant) failed" in caplog.text
