import pytest
import torch

from grpo_lightning.optim import Schedule, apply_settings, settings
from grpo_lightning.types import ConfigurationError


def test_factors_by_hand():
    linear = Schedule(decay="linear", warmup_steps=1, final_fraction=0.5)
    assert [linear.factor(step, 5) for step in range(6)] == [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]
    cosine = Schedule(decay="cosine")
    assert [round(cosine.factor(step, 4), 6) for step in (0, 2, 4, 9)] == [1.0, 0.5, 0.0, 0.0]
    assert Schedule().factor(10**6, float("inf")) == 1.0


@pytest.mark.parametrize("wrong", [{"warmup_steps": -1}, {"final_fraction": 1.5}])
def test_impossible_schedules_are_refused_by_key(wrong):
    with pytest.raises(ConfigurationError, match=f"model.schedule.{next(iter(wrong))}"):
        Schedule(**wrong)


def test_a_shape_that_ends_with_the_run_needs_an_end():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ConfigurationError, match=r"model\.schedule\.decay: cosine .* needs trainer\.max_steps"):
        Schedule(decay="cosine").scheduler(optimizer, float("inf"))
    Schedule(decay="constant").scheduler(optimizer, float("inf"))


def run(lr, betas, steps, state=None, num_steps=10):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=betas)
    scheduler = Schedule(decay="linear", warmup_steps=2).scheduler(optimizer, num_steps)
    configured = settings(optimizer)
    differences = []
    if state is not None:
        optimizer.load_state_dict(state[0])
        scheduler.load_state_dict(state[1])
        differences = apply_settings(optimizer, scheduler, configured)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler, differences


def test_the_configuration_wins_over_the_checkpoint_and_says_so():
    saved = run(1e-3, (0.9, 0.95), 4)
    state = (saved[0].state_dict(), saved[1].state_dict())
    optimizer, _, differences = run(5e-4, (0.9, 0.99), 3, state)
    straight, _, _ = run(5e-4, (0.9, 0.99), 7)
    assert optimizer.param_groups[0]["lr"] == straight.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert differences == [
        "lr: 0.0005 (the checkpoint had 0.001)",
        "betas: (0.9, 0.99) (the checkpoint had (0.9, 0.95))",
    ]


def test_the_same_configuration_changes_nothing():
    saved = run(1e-3, (0.9, 0.95), 4)
    optimizer, _, differences = run(1e-3, (0.9, 0.95), 0, (saved[0].state_dict(), saved[1].state_dict()))
    assert differences == []
    assert optimizer.param_groups[0]["lr"] == saved[0].param_groups[0]["lr"]


def test_another_schedule_wins_over_the_checkpoint_and_is_said():
    saved = run(1e-3, (0.9, 0.95), 4)
    optimizer, _, differences = run(1e-3, (0.9, 0.95), 0, (saved[0].state_dict(), saved[1].state_dict()), num_steps=18)
    # Warmed up after 2 steps, then down to 0: at step 4, 2 of 8 steps are gone before, and 2 of 16 now.
    assert saved[0].param_groups[0]["lr"] == pytest.approx(0.75e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.875e-3)
    (difference,) = differences
    assert difference.startswith("lr by the schedule: 0.000875")
