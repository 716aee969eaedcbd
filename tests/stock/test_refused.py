"""Callbacks that cannot do here what they are for."""

import pytest
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from stock.matrix import shows
from stock.runs import fit

from grpo_lightning.types import ConfigurationError


def refusal(monkeypatch, **settings):
    """The message with which a run ends, before any model is loaded."""
    monkeypatch.setattr("replay.TinyPolicy.load_model", None)
    with pytest.raises(ConfigurationError, match=r"^trainer\.\w+") as info:
        fit(**settings)
    return info.value


@shows("Callbacks", "BatchSizeFinder")
def test_there_is_no_batch_size_to_find(monkeypatch, claim):
    claim.refused(refusal(monkeypatch, callbacks=[BatchSizeFinder()]))


@shows("Callbacks", "LearningRateFinder")
def test_the_loss_does_not_show_a_learning_rate(monkeypatch, claim):
    claim.refused(refusal(monkeypatch, callbacks=[LearningRateFinder()]))


@shows("Callbacks", "StochasticWeightAveraging")
def test_the_average_with_a_schedule_of_its_own_is_refused(monkeypatch, claim):
    claim.refused(refusal(monkeypatch, callbacks=[StochasticWeightAveraging(1e-2)]))


@shows("Callbacks", "GradientAccumulationScheduler")
def test_the_accumulation_does_not_change_during_a_run(monkeypatch, claim):
    claim.refused(refusal(monkeypatch, callbacks=[GradientAccumulationScheduler({0: 2})]))


@shows("Callbacks", "BaseFinetuning, BackboneFinetuning")
def test_layers_are_not_frozen_before_they_are_there(monkeypatch, claim):
    message = refusal(monkeypatch, callbacks=[BackboneFinetuning()])
    assert str(message).startswith("trainer.callbacks: BackboneFinetuning")
    claim.refused(message)


@shows("Callbacks", "ModelPruning")
def test_weights_keep_their_names(monkeypatch, claim):
    claim.refused(refusal(monkeypatch, callbacks=[ModelPruning("l1_unstructured")]))


@shows("Flags of the Trainer", "reload_dataloaders_every_n_epochs")
def test_prompts_are_not_loaded_anew(monkeypatch, claim):
    claim.refused(refusal(monkeypatch, reload_dataloaders_every_n_epochs=2))


@shows("Flags of the Trainer", "precision: bf16-true, 16-true")
def test_weights_are_not_stepped_in_half_precision(monkeypatch, claim):
    refusal(monkeypatch, precision="16-true")
    claim.refused(refusal(monkeypatch, precision="bf16-true"))
