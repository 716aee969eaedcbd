from types import SimpleNamespace

import pytest
import replay

from grpo_lightning.callbacks.training_alarms import TrainingAlarms
from grpo_lightning.types import ConfigurationError

FINE = {
    "completion/truncation_ratio": 0.1,
    "reward/groups_with_signal": 0.2,
    "policy/entropy": 0.5,
    "sampler/kl": 0.01,
    "sampler/effective_sample_size": 0.3,
    "policy/gradient_norm": 1.0,
}


def see(alarms, metrics, *, ends_update=True):
    trainer = SimpleNamespace(callback_metrics={**FINE, **metrics}, global_step=7)
    alarms.on_train_batch_end(trainer, None, None, SimpleNamespace(ends_update=ends_update), 0)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"completion/truncation_ratio": 0.11}, "Step 7: 11% of the completions are cut off"),
        ({"reward/groups_with_signal": 0.19}, "in 81% of the groups all rewards are equal"),
        ({"policy/entropy": 0.04}, "entropy is 0.04 nats, below 0.05"),
        ({"policy/entropy": 1.0}, "entropy went from 0.5 to 1 nats within 20 updates"),
        ({"sampler/kl": 0.02}, "sampler and trainer differ by 0.02 nats"),
        ({"sampler/effective_sample_size": 0.29}, "effective sample size is 29% of the tokens"),
        ({"policy/gradient_norm": 10.1}, "gradient's length is 10.1, more than 10 times its median 1"),
    ],
)
def test_what_passes_its_bound_is_said_once(metrics, words, recwarn):
    alarms = TrainingAlarms()
    for _ in range(10):
        see(alarms, {})
    assert not recwarn.list
    see(alarms, metrics, ends_update=False)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=words) as caught:
        see(alarms, metrics)
    assert len(caught) == 1
    resumed = TrainingAlarms()
    resumed.load_state_dict(alarms.state_dict())
    recwarn.clear()
    for again in (alarms, resumed):
        see(again, metrics)
    assert not recwarn.list


def test_an_entropy_that_doubles_slowly_is_no_alarm(recwarn):
    alarms = TrainingAlarms()
    for update in range(60):
        see(alarms, {"policy/entropy": 0.5 * 2 ** (update / 21)})
    assert not recwarn.list


def test_a_gradient_is_compared_once_there_is_a_median(recwarn):
    alarms = TrainingAlarms()
    for norm in [1.0] * 9 + [50.0]:
        see(alarms, {"policy/gradient_norm": norm})
    assert not recwarn.list


def test_a_skipped_update_is_no_alarm(recwarn):
    trainer = SimpleNamespace(callback_metrics={}, global_step=0)
    TrainingAlarms().on_train_batch_end(trainer, None, None, SimpleNamespace(ends_update=True), 0)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_truncation_ratio": 1.5}, r"TrainingAlarms.max_truncation_ratio must be in \[0, 1\], got 1.5"),
        ({"min_entropy": -1.0}, "TrainingAlarms.min_entropy"),
        ({"max_gradient_factor": 0.5}, "TrainingAlarms.max_gradient_factor"),
    ],
)
def test_a_bound_out_of_its_range_is_refused(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        TrainingAlarms(**settings)


def test_it_sees_the_metrics_of_a_run():
    with pytest.warns(UserWarning, match="100% of the completions are cut off"):
        replay.run(callbacks=[TrainingAlarms(min_effective_sample_size=0.0, max_sampler_kl=float("inf"))])
