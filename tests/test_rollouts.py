"""Rollouts that are drawn ahead: from which weights, how they are corrected, and what happens when something fails."""

import math
import traceback
from types import SimpleNamespace

import pytest
import replay
import torch
from copying import CopyingEngine, LosingEngine
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from grpo_lightning.objective import (
    Bypass,
    Clipped,
    GroupMean,
    Objective,
    TokenMean,
    TokenRatio,
    TruncatedWeights,
)
from grpo_lightning.policy import NamedWeights
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rollout import InProcessEngine, RolloutLostError
from grpo_lightning.types import Coordinates, FinishReason, GenerationRequest, SamplingParams, Stream

UPDATES = 2  # of an iteration
SETTINGS = {"num_epochs": UPDATES, "iterations": 5, "dtype": "float64", "objective": "default", "draw_ahead": True}


class Watch(Callback):
    """The rollout of each iteration, and the weights after so many updates."""

    def __init__(self):
        self.rollouts, self.weights = [], {}

    def on_phase(self, trainer, pl_module, phase):
        if phase == "score":
            self.weights[trainer.global_step] = {n: t.clone() for n, t in NamedWeights(pl_module.policy.model)}
        if phase == "update" and pl_module.rollout not in self.rollouts:
            self.rollouts.append(pl_module.rollout)


def run(engine=None, callbacks=(), **settings):
    watch = Watch()
    module, data, trainer, record = replay.make(**{**SETTINGS, **settings}, callbacks=[watch, *callbacks])
    module.engine = engine or module.engine
    trainer.fit(module, data)
    return SimpleNamespace(module=module, trainer=trainer, record=record, watch=watch)


@pytest.fixture(scope="module")
def straight():
    return run()


def assert_same(found, wanted):
    for metrics, expected in zip(found.record.metrics, wanted.record.metrics, strict=True):
        assert metrics == expected
    assert all(map(torch.equal, found.record.weights, wanted.record.weights))


# Order


def test_a_rollout_is_drawn_from_the_weights_before_the_last_iteration(straight):
    """Tokens, log-probs and version are those of an engine that is given these weights and the coordinates."""
    assert len(straight.watch.rollouts) == SETTINGS["iterations"]
    policy = straight.module.policy
    engine = InProcessEngine()
    model = replay.TinyPolicy(torch.float64).load_model(seed=3)
    engine.setup(model, policy.tokenizer, policy.eos_token_ids)
    for rollout in straight.watch.rollouts:
        version = UPDATES * max(0, rollout.iteration - 1)
        model.load_state_dict(straight.watch.weights[version], strict=False)  # tied ones come once
        engine.update_weights((), version)
        requests = [
            GenerationRequest(slot=slot, token_ids=prompt.token_ids, num_completions=4)
            for slot, prompt in zip(rollout.slots, rollout.prompts, strict=True)
        ]
        at = Coordinates(seed=3, stream=Stream.TRAINING, iteration=rollout.iteration)
        assert list(rollout.completions) == engine.generate(requests, SamplingParams(max_new_tokens=12), at)


@pytest.mark.parametrize("updates_first", [0, UPDATES], ids=["before the updates", "after the updates"])
def test_the_timing_does_not_enter(straight, updates_first):
    assert_same(run(CopyingEngine(updates_first)), straight)


def test_staleness_is_counted_in_updates(straight):
    # Of iterations 0 to 4: the first is drawn when it is due, the second with it.
    expected = [0, UPDATES, UPDATES, UPDATES, UPDATES]
    metrics = straight.record.metrics[::UPDATES]
    assert [found["sampler/staleness"] for found in metrics] == expected
    assert [found["sampler/staleness_max"] for found in metrics] == expected


def test_prompts_come_in_the_order_that_they_have_without(straight):
    ordinary = run(draw_ahead=False, live=True)
    assert [r.prompts for r in straight.watch.rollouts] == [r.prompts for r in ordinary.watch.rollouts]
    assert [f["sampler/staleness"] for f in ordinary.record.metrics] == [0.0] * UPDATES * SETTINGS["iterations"]


def test_the_last_iteration_begins_no_rollout(straight):
    assert straight.module.ahead is None
    assert straight.module.prompts.epoch * 12 + straight.module.prompts.cursor == 4 * SETTINGS["iterations"]


@pytest.mark.parametrize("every", [1, UPDATES])
def test_an_evaluation_waits_for_what_is_being_drawn_and_does_not_disturb_it(straight, every):
    changes = {"limit_val_batches": 1.0, "val_check_interval": every, "check_val_every_n_epoch": None}
    found = run(CopyingEngine(updates_first=1), **changes)  # when the first update is made, and evaluated
    assert all(map(torch.equal, found.record.weights, straight.record.weights))


# Correction

FIRST, SECOND = 4, 7  # two tokens
BEFORE, AFTER = {FIRST: 1 / 4, SECOND: 1 / 2}, {FIRST: 1 / 2, SECOND: 1 / 4}


class TwoTokens(CopyingEngine):
    """Completes with the one token, then with the other; log-probs are those of the weights that it holds."""

    @torch.no_grad()
    def draw(self, requests, sampling, coordinates):
        drawn = []
        for completion, token in zip(super().draw(requests, sampling, coordinates), [FIRST, SECOND] * 4, strict=True):
            logits_V = self._model(input_ids=torch.tensor([[3]])).logits[0, -1]
            changes = {"token_ids": (token,), "sampler_logprobs": (float(logits_V.log_softmax(0)[token]),)}
            drawn.append(type(completion)(**{**vars(completion), **changes, "finish_reason": FinishReason.LENGTH}))
        return drawn


class FirstIsRight(RewardCallback):
    def score(self, prompts, completions):
        return [float(completion.token_ids[0] == FIRST) for completion in completions]


class SetDistribution(Callback):
    """Gives the policy a distribution that does not depend on what was read, before and after the first iteration."""

    def on_train_start(self, trainer, pl_module):
        self._set(pl_module.policy.model, BEFORE)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._set(pl_module.policy.model, AFTER)

    @torch.no_grad()
    def _set(self, model, probabilities):
        others = (1 - sum(probabilities.values())) / (model.config.vocab_size - 2)
        for parameter in model.parameters():
            parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.model.norm.weight.fill_((1 + model.config.rms_norm_eps) ** 0.5)
        for token in range(model.config.vocab_size):
            model.lm_head.weight[token, 0] = math.log(probabilities.get(token, others))


class UntiedPolicy(replay.TinyPolicy):
    def __init__(self):
        super().__init__(torch.float64)
        self.config["tie_word_embeddings"] = False


@pytest.mark.parametrize("num_epochs", [1, 2])
@pytest.mark.parametrize("correction", [TruncatedWeights(weight=TokenRatio(), upper=100.0), Bypass()])
def test_the_correction_is_applied_once(correction, num_epochs):
    # A group has both tokens, with rewards 1 and 0 and so advantages 1/2 and -1/2. They were drawn with probabilities
    # 1/4 and 1/2, and are learned from with 1/2 and 1/4: the weights are 2 and 1/2.
    #     objective = (2 * 1/2 - 1/2 * 1/2) / 2 = 3/8
    # Without a correction it would be 0, corrected twice (4 * 1/2 - 1/4 * 1/2) / 2 = 15/16.
    objective = Objective(
        advantage=GroupMean(),
        scale=None,
        ratio=TokenRatio(),
        surrogate=Clipped(clip_low=100.0, clip_high=100.0),
        aggregation=TokenMean(),
        correction=correction,
    )
    module, data, trainer, record = replay.make(
        objective=objective,
        group_size=2,
        num_epochs=num_epochs,
        iterations=2,
        optimizer="SGD",
        lr=0.0,
        draw_ahead=True,
        callbacks=[SetDistribution()],
    )
    module.source, module.engine = UntiedPolicy(), TwoTokens()
    trainer.callbacks = [FirstIsRight("first"), *(c for c in trainer.callbacks if not isinstance(c, RewardCallback))]
    trainer.fit(module, data)
    losses = [metrics["train/policy_loss"] for metrics in record.metrics]
    assert losses[0] == pytest.approx(0.0, abs=1e-12)  # drawn and learned from with the same probabilities
    assert losses[num_epochs] == pytest.approx(-3 / 8, abs=1e-12)
    assert record.metrics[num_epochs]["sampler/weight"] == pytest.approx((2 + 1 / 2) / 2)


# Faults


class Faulty(CopyingEngine):
    """Raises where the rollout of iteration 2 is drawn in the background."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def draw(self, requests, sampling, coordinates):
        if coordinates.iteration == 2 and self.is_drawing and coordinates.stream == Stream.TRAINING:
            raise self.error
        return super().draw(requests, sampling, coordinates)


def test_what_is_raised_in_the_background_is_raised_by_the_run():
    with pytest.raises(KeyError, match="as a bug would") as raised:
        run(Faulty(KeyError("as a bug would")))
    assert {"draw", "next_rollout"} <= {frame.name for frame in traceback.extract_tb(raised.value.__traceback__)}


def test_a_lost_rollout_is_drawn_again_from_the_weights_of_now(straight, capsys):
    found = run(Faulty(RolloutLostError("a server is gone")))
    versions = [{c.weight_version for c in rollout.completions} for rollout in found.watch.rollouts]
    assert versions == [{0}, {0}, {2 * UPDATES}, {2 * UPDATES}, {3 * UPDATES}]
    assert [r.prompts for r in found.watch.rollouts] == [r.prompts for r in straight.watch.rollouts]
    assert found.record.metrics[2 * UPDATES]["sampler/staleness"] == 0


class StopAt(Callback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.error is not None:
                raise self.error
            trainer.should_stop = True


def test_the_end_of_a_run_ends_what_is_being_drawn():
    engine = CopyingEngine(updates_first=10**6)
    found = run(engine, [StopAt(UPDATES)])
    assert engine.is_closed
    assert len(found.record.weights) == UPDATES


# Resuming


def resumed(path, **changes):
    module, data, trainer, record = replay.make(**{**SETTINGS, **changes})
    trainer.fit(module, data, ckpt_path=path)
    return record, module


@pytest.mark.parametrize(
    ("micro_batch", "first_update"),
    [
        (4 * 3, 6),  # after iteration 3
        (4 * 2 + 2, 5),  # in the middle of an iteration
        (4 * 2 + 3, 5),  # inside an accumulation window: from its start
        (4 * 2 + 1, 4),  # inside the first window of an iteration, whose rollout has been taken
        (1, 0),  # inside the very first window
    ],
)
def test_a_run_that_is_interrupted_anywhere_goes_on_bit_for_bit(tmp_path, micro_batch, first_update):
    path, settings = tmp_path / "a.ckpt", {"accumulate": 2, "iterations": 5}
    whole = run(**settings, callbacks=[replay.SaveAt(micro_batch, path)]).record
    record, _ = resumed(path, **settings)
    assert len(record.weights) == UPDATES * 5 - first_update
    for i in range(1, len(record.weights) + 1):
        assert torch.equal(record.weights[-i], whole.weights[-i])
        assert record.metrics[-i] == whole.metrics[-i]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the resumed run goes on in the same folder
def test_after_an_exception_too(tmp_path, straight):
    def keep():
        return ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, every_n_train_steps=10**6)

    with pytest.raises(KeyError):
        run(callbacks=[keep(), StopAt(3, KeyError())], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    record, _ = resumed(path, callbacks=[keep()], enable_checkpointing=True)
    assert all(map(torch.equal, record.weights, straight.record.weights[-len(record.weights) :]))
    assert len(record.weights) >= UPDATES * 3


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_after_an_exception_in_the_background_the_prompts_are_drawn_again(tmp_path, straight):
    keep = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, every_n_train_steps=10**6)
    with pytest.raises(KeyError):
        run(Faulty(KeyError()), [keep], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    watch = Watch()
    resumed(path, callbacks=[watch])
    assert [r.iteration for r in watch.rollouts] == [2, 3, 4]
    assert [r.prompts for r in watch.rollouts] == [r.prompts for r in straight.watch.rollouts[2:]]
    assert {c.weight_version for c in watch.rollouts[0].completions} == {2 * UPDATES}


@pytest.mark.parametrize("changes", [{"draw_ahead": False, "live": True}, {"temperature": 0.5}])
def test_a_run_that_draws_otherwise_now_draws_the_rollout_again(tmp_path, straight, changes):
    path, watch = tmp_path / "a.ckpt", Watch()
    run(callbacks=[replay.SaveAt(2 * UPDATES, path)])
    module, data, trainer, _ = replay.make(
        **{**SETTINGS, "iterations": 3, "callbacks": [watch]} | {k: v for k, v in changes.items() if k != "temperature"}
    )
    if "temperature" in changes:
        module.sampling = SamplingParams(max_new_tokens=12, **changes)
    trainer.fit(module, data, ckpt_path=path)
    (rollout,) = watch.rollouts
    assert rollout.prompts == straight.watch.rollouts[2].prompts
    assert {c.weight_version for c in rollout.completions} == {2 * UPDATES}


def test_two_ranks_resume_bit_for_bit_and_draw_what_one_draws(tmp_path, straight):
    number, path = 2 * UPDATES + 1, str(tmp_path / "a.ckpt")
    settings = {name: value for name, value in SETTINGS.items() if name != "iterations"}
    runs = [
        {**settings, "save_at": [(number, path)]},
        {**settings, "ckpt_path": path},
        {**settings, "engine": LosingEngine},
    ]
    whole, again, with_loss = replay.in_world(tmp_path / "world", runs, ranks=2)
    for after, before in zip(again, whole, strict=True):
        assert len(after["weights"]) == UPDATES * 5 - number
        assert all(map(torch.equal, after["weights"], before["weights"][number:]))
        assert after["metrics"] == before["metrics"][number:]
        assert (after["slots"], after["tokens"]) == (before["slots"], before["tokens"])
    drawn = {slot: rank["tokens"][4 * p : 4 * p + 4] for rank in whole for p, slot in enumerate(rank["slots"])}
    last = straight.watch.rollouts[-1]
    assert drawn == {s: [c.token_ids for c in last.completions[4 * p : 4 * p + 4]] for p, s in enumerate(last.slots)}
    # What one rank has lost, both draw again.
    for rank in with_loss:
        assert [metrics["sampler/staleness_max"] for metrics in rank["metrics"][::UPDATES]] == [0, 2, 0, 2, 2]
