"""Times and work of an iteration, held against counts that are made from outside."""

import pytest
import replay
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

from grpo_lightning.accounting import ModelSize, decode_bytes, update_flops
from grpo_lightning.callbacks.throughput import (
    Throughput,
    groups_of,
    learned_groups,
    measured_bandwidth,
    measured_flops,
    peak_memory,
)
from grpo_lightning.types import ConfigurationError

FLOPS, BANDWIDTH = 1e9, 2e9


class Outside(Callback):
    """What was logged at each iteration's end, and the work that it stands for."""

    def __init__(self):
        self.logged, self.groups, self.size = [], [], None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.learned = learned_groups(pl_module.experience)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.ends_iteration:
            self.size = ModelSize.of(pl_module.policy.model)
            self.groups.append((groups_of(pl_module.rollout), self.learned))
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture(scope="module")
def run():
    outside, throughput = Outside(), Throughput(peak_flops=FLOPS, peak_bandwidth=BANDWIDTH)
    replay.run(iterations=3, accumulate=2, callbacks=(throughput, outside))
    return outside, throughput


def test_the_phases_make_up_the_iteration(run):
    for logged in run[0].logged:
        phases = [logged[f"time/{name}"] for name in ("generate", "score", "prepare", "update")]
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(logged["time/iteration"], rel=1e-5)  # fp32


def test_rates_are_work_over_time(run):
    outside, _ = run
    for logged, (groups, learned) in zip(outside.logged, outside.groups, strict=True):
        generated = sum(sum(group.completions) for group in groups)
        rate = logged["throughput/generated_tokens_per_second"]
        assert rate * logged["time/generate"] == pytest.approx(generated, rel=1e-5)
        mfu = update_flops(outside.size, learned) / (FLOPS * logged["time/update"])
        assert logged["throughput/update_mfu"] == pytest.approx(mfu, rel=1e-5)
        mbu = decode_bytes(outside.size, groups) / (BANDWIDTH * logged["time/generate"])
        assert logged["throughput/decode_mbu"] == pytest.approx(mbu, rel=1e-5)


def test_nothing_is_recomputed_without_a_limit_and_nothing_is_padding(run):
    for logged in run[0].logged:
        assert logged["throughput/recomputed_ratio"] == 0
        assert logged["throughput/padding_ratio"] == 0


def test_rows_of_one_length_are_padded():
    outside, throughput = Outside(), Throughput(peak_flops=FLOPS, peak_bandwidth=BANDWIDTH)
    replay.run(iterations=1, layout="padded", callbacks=(throughput, outside))
    assert 0 < outside.logged[0]["throughput/padding_ratio"] < 1


@pytest.mark.filterwarnings("ignore:model.max_tokens_per_microbatch is")
def test_every_token_of_a_cut_micro_batch_is_computed_twice():
    outside = Outside()
    replay.run(iterations=2, callbacks=(Throughput(FLOPS, BANDWIDTH), outside), max_tokens=40)
    assert [logged["throughput/recomputed_ratio"] for logged in outside.logged] == [0.5, 0.5]


def test_the_summary_is_the_mean_and_says_what_was_given(run):
    outside, throughput = run
    summary = throughput.summary()
    times = [logged["time/iteration"] for logged in outside.logged]
    assert summary["time/iteration"] == pytest.approx(sum(times) / 3, rel=1e-5)
    assert (summary["peak_flops"], summary["peak_flops_measured"]) == (FLOPS, False)
    assert Throughput().summary() == {}


def test_a_module_without_rollouts_is_left_alone(tmp_path):
    throughput = Throughput()
    trainer = replay.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[throughput], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert throughput.summary() == {}


def test_peaks_are_measured_and_plausible():
    # A processor does more than 10 million operations a second and less than 10^17, and reads as many bytes.
    assert 1e7 < measured_flops(torch.ones(1), width=64) < 1e17
    assert 1e7 < measured_bandwidth(torch.device("cpu"), num_bytes=2**20) < 1e17
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.parametrize("name", ["peak_flops", "peak_bandwidth"])
def test_a_peak_of_nothing_is_refused(name):
    with pytest.raises(ConfigurationError, match=rf"Throughput\.{name} must be > 0 or null, got 0"):
        Throughput(**{name: 0})
