from types import SimpleNamespace

import pytest

from grpo_lightning.batching import IterationShape
from grpo_lightning.epochs import epoch_of, overfitted

SHAPE = IterationShape(prompts_per_iteration=3, group_size=2, num_epochs=1, num_minibatches=2)


@pytest.mark.parametrize(("setting", "number"), [(0.0, 12), (4, 6), (0.25, 3), (1.0, 12)])
def test_as_many_prompts_as_the_batches_learn_from(setting, number):
    # Four iterations of two micro-batches: four batches are two iterations of three prompts.
    trainer = SimpleNamespace(overfit_batches=setting, limit_train_batches=setting or 1.0, accumulate_grad_batches=1)
    loader = epoch_of(trainer, SHAPE, range(12))
    assert len(loader) == 8
    assert overfitted(trainer, loader, SHAPE, range(12)) == range(number)


def test_an_epoch_goes_once_through_the_prompts():
    trainer = SimpleNamespace(limit_train_batches=1.0, accumulate_grad_batches=3)
    assert len(epoch_of(trainer, SHAPE, range(10))) == 4 * 2 * 3
