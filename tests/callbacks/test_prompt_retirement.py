"""What the policy has learned is not drawn again, and the run never runs dry."""

from types import SimpleNamespace

import pytest
import replay
import torch

from grpo_lightning.callbacks.prompt_retirement import PromptRetirement
from grpo_lightning.data import PromptStream
from grpo_lightning.groups import GroupOutcome
from grpo_lightning.types import ConfigurationError, Prompt


def run_of(num_prompts=8, prompts_per_iteration=2):
    prompts = [Prompt(index=i, token_ids=(i,), text="") for i in range(num_prompts)]
    shape = SimpleNamespace(prompts_per_iteration=prompts_per_iteration)
    return SimpleNamespace(prompts=PromptStream(prompts, seed=0), shape=shape, outcomes=())


def tell(controller, module, *groups):
    """Groups as (prompt index, passed, scored)."""
    module.outcomes = [GroupOutcome(s, *group, is_kept=True) for s, group in enumerate(groups)]
    controller.on_update_end(None, module, {})
    return module.prompts.retired


def test_a_prompt_is_retired_at_the_bound():
    # 0.75 of 8 is 6; of the 7 that could be scored 5.25; a group that nobody could score says nothing.
    retired = tell(PromptRetirement(pass_rate=0.75), run_of(), (0, 5, 8), (1, 6, 8), (2, 5, 7), (3, 6, 7), (4, 0, 0))
    assert retired == {1, 3}


def test_a_window_is_judged_when_it_is_full():
    controller, module = PromptRetirement(pass_rate=0.9, window=2), run_of()
    assert tell(controller, module, (0, 10, 10), (1, 10, 10)) == set()
    # Prompt 0: 18 of 20 over two groups. Prompt 1: 17 of 20, and then 7 + 10 of 20, the first group forgotten.
    assert tell(controller, module, (0, 8, 10), (1, 7, 10)) == {0}
    assert tell(controller, module, (1, 10, 10)) == {0}
    assert tell(controller, module, (1, 10, 10)) == {0, 1}


def test_a_retired_prompt_is_never_drawn_again():
    controller, module = PromptRetirement(), run_of()
    tell(controller, module, (3, 8, 8), (5, 8, 8))
    assert not {prompt.index for prompt in module.prompts.take(60)} & {3, 5}


def test_as_many_as_an_iteration_has_are_left(caplog):
    controller, module = PromptRetirement(), run_of(num_prompts=4, prompts_per_iteration=3)
    with caplog.at_level("INFO"):
        assert tell(controller, module, *((i, 8, 8) for i in range(4))) == {0}
        tell(controller, module, (1, 8, 8))
    assert caplog.text.count("no further prompt is retired") == 1


@pytest.mark.parametrize("micro_batch", [4 * 3, 4 * 3 + 1, 4 * 3 + 2, 4 * 3 + 3])
def test_retirement_resumes_exactly(tmp_path, micro_batch):
    def run(ckpt_path=None, callbacks=(), iterations=7):
        controller = PromptRetirement(pass_rate=0.6, window=2)
        module, data, trainer, record = replay.make(
            callbacks=[controller, *callbacks], iterations=iterations, num_epochs=2, accumulate=2, num_solved_in_seven=4
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, record, controller

    path = tmp_path / "a.ckpt"
    straight, record, controller = run()
    run(iterations=4, callbacks=[replay.SaveAt(micro_batch, path)])
    again, resumed, same = run(ckpt_path=path)
    assert straight.prompts.retired
    assert again.prompts.state_dict() == straight.prompts.state_dict()
    assert same.state_dict() == controller.state_dict()
    assert torch.equal(resumed.weights[-1], record.weights[-1])


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: PromptRetirement(pass_rate=0.0), "PromptRetirement.pass_rate must be in"),
        (lambda: PromptRetirement(pass_rate=1.1), "PromptRetirement.pass_rate must be in"),
        (lambda: PromptRetirement(window=0), "PromptRetirement.window must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(make, key):
    with pytest.raises(ConfigurationError, match=key):
        make()
