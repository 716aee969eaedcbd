"""The reference is replaced when it is time, and is in the checkpoint from then on."""

import pytest
import replay
import torch
from enumeration import far, shortfall, worst
from lightning.pytorch.callbacks import Callback
from mutants import Mutant, replaced

from grpo_lightning.callbacks.reference_average import ReferenceAverage
from grpo_lightning.callbacks.reference_refresh import ReferenceRefresh
from grpo_lightning.objective import Clipped, GroupMean, Objective, SequenceMeanTokenMean, TokenRatio
from grpo_lightning.types import ConfigurationError

WITHOUT_REFERENCE = Objective(
    advantage=GroupMean(),
    scale=None,
    ratio=TokenRatio(),
    surrogate=Clipped(clip_low=0.2, clip_high=0.2),
    aggregation=SequenceMeanTokenMean(),
)


class Watch(Callback):
    """The reference's weights after each update."""

    def __init__(self):
        self.references = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.ends_update:
            self.references.append(flat(pl_module.reference))


def flat(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


def run(controller, ckpt_path=None, callbacks=(), **settings):
    watch = Watch()
    module, data, trainer, record = replay.make(callbacks=[controller, watch, *callbacks], **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, record, watch.references


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({"every_n_steps": 3}, [2, 5]),
        ({"every_n_iterations": 1}, [1, 3, 5]),
        ({"every_n_iterations": 2}, [3]),
    ],
)
def test_the_reference_is_the_policy_of_the_last_refresh(settings, due):
    _, record, references = run(ReferenceRefresh(**settings), iterations=3, num_epochs=2)
    expected = None
    for update, reference in enumerate(references):
        expected = record.weights[update] if update in due else expected
        if expected is None:
            assert torch.equal(reference, references[0])
            assert not torch.equal(reference, record.weights[update])
        else:
            assert torch.equal(reference, expected)


def test_after_a_refresh_the_divergence_begins_at_zero(prove):
    def error():
        _, record, _ = run(ReferenceRefresh(every_n_iterations=2), iterations=4, num_epochs=2)
        divergences = [metrics["policy/kl"] for metrics in record.metrics]
        # Updates 0 and 4 begin an iteration with the policy as reference: equal weights give equal log-probabilities.
        moved = [shortfall(divergence, 1e-6) for i, divergence in enumerate(divergences) if i % 4]
        return worst(divergences[0], divergences[4], moved)

    prove(
        "a refresh of the reference sets its divergence to 0 at that step (fp32)",
        "DeepSeekMath, algorithm 1",
        error,
        replaced("not refreshed", "models.mix", lambda reference, policy, *, share: None),
        Mutant("half refreshed", "models.mix", lambda f: lambda *args, share: f(*args, share=share / 2)),
        tolerance=1e-7,
    )


def test_the_average_is_exact(prove):
    def error():
        _, record, references = run(ReferenceAverage(share=0.6, every_n_steps=2), iterations=4, dtype="float64")
        # Updates 1 and 3 move it.
        second = 0.6 * record.weights[1] + 0.4 * references[0]
        fourth = 0.6 * record.weights[3] + 0.4 * second
        pairs = zip(references[1:], (second, second, fourth), strict=True)
        return worst(far(reference, expected) for reference, expected in pairs)

    prove(
        "the moving reference: share pi_theta + (1 - share) pi_ref, weight by weight",
        "Learn Your Reference Model, equation 8",
        error,
        Mutant("shares swapped", "models.mix", lambda f: lambda *args, share: f(*args, share=1 - share)),
        Mutant("moved at every step", "callbacks.reference_average.ReferenceAverage.on_update_end", at_every_step),
        tolerance=1e-14,  # fp64: a multiplication and an addition of each are rounded
    )


def at_every_step(on_update_end):
    return lambda self, trainer, module, metrics: module.move_reference(self.share)


@pytest.mark.parametrize("micro_batch", [4 * 3, 4 * 3 + 2, 4 * 3 + 3], ids=["between", "in the middle", "in a window"])
@pytest.mark.parametrize(
    "controller", [lambda: ReferenceRefresh(every_n_steps=3), lambda: ReferenceAverage(share=0.5, every_n_steps=3)]
)
def test_a_moved_reference_resumes_bit_for_bit(tmp_path, controller, micro_batch):
    settings = {"iterations": 6, "num_epochs": 2, "accumulate": 2}
    _, straight, references = run(controller(), **settings)
    path = tmp_path / "a.ckpt"
    run(controller(), **{**settings, "iterations": 4}, callbacks=[replay.SaveAt(micro_batch, path)])
    _, resumed, after = run(controller(), ckpt_path=path, **settings)
    assert len(after) >= 4
    for i in range(1, len(after) + 1):
        assert torch.equal(after[-i], references[-i])
        assert torch.equal(resumed.weights[-i], straight.weights[-i])
        assert resumed.metrics[-i] == straight.metrics[-i]


def test_only_a_reference_that_has_moved_is_in_the_checkpoint(tmp_path):
    names = []
    for micro_batch in (2, 3):
        path = tmp_path / f"{micro_batch}.ckpt"
        run(ReferenceRefresh(every_n_steps=3), iterations=3, callbacks=[replay.SaveAt(micro_batch, path)])
        names.append({name.split(".")[0] for name in torch.load(path)["state_dict"]})
    assert names == [{"policy"}, {"policy", "reference"}]


def test_a_run_without_a_reference_goes_on_from_such_a_checkpoint(tmp_path):
    path = tmp_path / "a.ckpt"
    run(ReferenceRefresh(every_n_steps=1), iterations=2, callbacks=[replay.SaveAt(2, path)])
    module, data, trainer, _ = replay.make(iterations=3, objective=WITHOUT_REFERENCE)
    trainer.fit(module, data, ckpt_path=path)
    assert not module.has_moved_reference
    assert module.iteration == 3


@pytest.mark.parametrize("controller", [ReferenceRefresh(every_n_steps=1), ReferenceAverage()])
def test_a_run_without_a_reference_is_refused(controller):
    module, data, trainer, _ = replay.make(callbacks=[controller], objective=WITHOUT_REFERENCE)
    with pytest.raises(ConfigurationError, match=r"needs a reference model.*model\.objective\.kl"):
        trainer.fit(module, data)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ReferenceRefresh(), "every_n_steps and every_n_iterations"),
        (lambda: ReferenceRefresh(every_n_steps=1, every_n_iterations=1), "every_n_steps and every_n_iterations"),
        (lambda: ReferenceRefresh(every_n_steps=0), "every_n_steps must be >= 1, got 0"),
        (lambda: ReferenceRefresh(every_n_iterations=-1), "every_n_iterations must be >= 1, got -1"),
        (lambda: ReferenceAverage(share=0.0), "share must be in"),
        (lambda: ReferenceAverage(share=1.5), "share must be in"),
        (lambda: ReferenceAverage(every_n_steps=0), "every_n_steps must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(make, key):
    with pytest.raises(ConfigurationError, match=key):
        make()
