"""A GRPO run on recorded completions, in this process or on the ranks of a world.

The engine's completions, and their rewards, are a function of (iteration, slot, sample) alone, with ragged lengths, so
that every run learns from the same tokens whatever its weights.
"""

import gc
import os
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import controlled
import torch
import yaml
from copying import CopyingEngine
from exact_norms import in_double
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from shards import held_bytes, local, num_accumulated, optimizer_states, set_all, whole, whole_gradient
from worlds import launch

from grpo_lightning import GRPOModule
from grpo_lightning.batching import Packed, Padded, SharedPrefix
from grpo_lightning.callbacks.gradient_norm import GradientNorm
from grpo_lightning.data import PromptDataModule
from grpo_lightning.functional.random import uniforms
from grpo_lightning.groups import DynamicSampling
from grpo_lightning.objective import (
    K2,
    K3,
    Clipped,
    EntropyBonus,
    GroupMean,
    GroupStd,
    KLInLoss,
    Objective,
    OffPolicySequences,
    SequenceMeanTokenMean,
    TokenMean,
    TokenRatio,
    TopEntropyTokens,
    TruncatedWeights,
    TwoSidedClipped,
)
from grpo_lightning.optim import Schedule
from grpo_lightning.policy import CharacterPolicy, Compile, LoRA
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rollout import InProcessEngine, RolloutEngine
from grpo_lightning.strategies import ZeROStrategy
from grpo_lightning.types import Completion, FinishReason, SamplingParams, StepScores

LAYOUTS = {"padded": Padded, "packed": Packed, "shared_prefix": SharedPrefix}
ALPHABET = "0123456789+="


class TinyPolicy(CharacterPolicy):
    def __init__(self, dtype, *, head_dim=8):
        super().__init__(ALPHABET, hidden_size=2 * head_dim, num_layers=2, num_heads=2, max_positions=64)
        self.dtype = dtype

    def load_model(self, *, seed):
        model = super().load_model(seed=seed)
        return in_double(model) if self.dtype is torch.float64 else model.to(self.dtype)


class Sums(PromptDataModule):
    def rows(self, split):
        number = {"train": 12, "validation": 6, "test": 0}[split]
        first = {"train": 0, "validation": 50, "test": 0}[split]
        return [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(first, first + number)]


class RecordedEngine(RolloutEngine):
    def setup(self, model, tokenizer, eos_token_ids):
        self.tokenizer = tokenizer

    def generate(self, requests, sampling, coordinates):
        return [self._completion(r.slot, s, coordinates) for r in requests for s in range(r.num_completions)]

    def _completion(self, slot, sample, coordinates):
        u = uniforms(
            seed=7,
            stream=coordinates.stream,
            iteration=coordinates.iteration,
            slots=torch.full((12,), slot),
            samples=torch.full((12,), sample),
            positions=torch.arange(12),
        )
        length = 1 + int(u[0] * 11)
        ids = tuple(3 + int(x * len(ALPHABET)) for x in u[1 : 1 + length])
        return Completion(
            token_ids=ids,
            sampler_logprobs=tuple(-2.2 - float(x) for x in u[:length]),  # about that of thirteen tokens alike
            text=self.tokenizer.decode(ids),
            finish_reason=FinishReason.LENGTH,
        )

    def update_weights(self, named_tensors, version):
        pass


class UnevenEngine(InProcessEngine):
    """Draws one token alone for each slot of odd number: of two ranks, the second is done at once."""

    def generate(self, requests, sampling, coordinates):
        even, odd = ([r for r in requests if r.slot % 2 == parity] for parity in (0, 1))
        long = iter(super().generate(even, sampling, coordinates) if even else ())
        short = iter(super().generate(odd, replace(sampling, max_new_tokens=1), coordinates) if odd else ())
        return [c for r in requests for c in islice(short if r.slot % 2 else long, r.num_completions)]


class TokenSum(RewardCallback):
    """Depends on the tokens alone; where `fails_on_odd`, fails on the prompts of odd index.

    Where `num_solved_in_seven` is given, that many completions in seven are right, the others wrong. In the iteration
    `fails_in`, it fails on all of them, and nothing is learned.
    """

    def __init__(self, fails_on_odd=False, num_solved_in_seven=None, fails_in=None):
        super().__init__(name="token_sum")
        self.fails_on_odd, self.num_solved_in_seven, self.fails_in = fails_on_odd, num_solved_in_seven, fails_in
        self.iteration = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.iteration = pl_module.iteration

    def score(self, prompts, completions):
        if self.iteration == self.fails_in:
            return [float("nan")] * len(prompts)
        odd = [self.fails_on_odd and prompt.index % 2 == 1 for prompt in prompts]
        sums = [sum(c.token_ids) % 7 / 7 for c in completions]
        if self.num_solved_in_seven is not None:
            sums = [float(s * 7 < self.num_solved_in_seven - 0.5) for s in sums]
        return [float("nan") if failed else s for failed, s in zip(odd, sums, strict=True)]


class Steps(RewardCallback):
    """A score for every other token, and for the last."""

    def __init__(self):
        super().__init__(name="steps", weight=0.2)

    def score(self, prompts, completions):
        return [self._of(c.token_ids) for c in completions]

    def _of(self, ids):
        ends = sorted({*range(0, len(ids), 2), len(ids) - 1})
        return StepScores(tuple(ids[end] % 5 / 5 for end in ends), tuple(ends))


class Record(Callback):
    """The gradient before clipping and the metrics of every update, and the weights after it.

    What the rank holds of weights, gradients and optimizer is that of the last update.
    """

    def __init__(self):
        self.gradients, self.weights, self.metrics, self.num_left = [], [], [], []
        self.held_bytes = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.held_bytes = held_bytes(trainer)
        self.gradients.append(torch.cat([whole_gradient(p).flatten().clone() for p in trained(pl_module)]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.ends_update:
            logged = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("validation")}
            self.metrics.append(logged)
            self.weights.append(weights(pl_module))
            self.num_left.append(num_accumulated(trainer))


class SaveAt(Callback):
    """Saves after a micro-batch, counted from 1 over the whole run: what a time interval does, but at a chosen time."""

    def __init__(self, number, path):
        self.number, self.path = number, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.number:
            trainer.save_checkpoint(self.path)


class SecondUpdateFrom(Callback):
    """Sets the weights before the second update to those that another run has recorded after its first."""

    def __init__(self, path):
        self.weights = torch.load(path)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and batch.microbatch == 0:
            set_all(pl_module.policy.parameters(), self.weights)


def trained(module):
    return [p for p in module.policy.parameters() if p.requires_grad]


def weights(module):
    return torch.cat([whole(p).detach().flatten().clone() for p in module.policy.parameters()])


def overlay(name):
    """The objective of `configs/algorithm/<name>.yaml`."""
    text = (Path(__file__).parents[1] / "configs/algorithm" / f"{name}.yaml").read_text()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    stated = yaml.safe_load(text)["model"]["init_args"]["objective"]
    return parser.instantiate_classes(parser.parse_object({"objective": stated})).objective


def everything():
    """Every metric that there is: a clip with three sides, a correction, both kinds of masks, both penalties."""
    return Objective(
        advantage=GroupMean(),
        scale=GroupStd(ddof=1, epsilon=1e-6),
        ratio=TokenRatio(),
        surrogate=TwoSidedClipped(clip_low=0.01, clip_high=0.01, delta=1.02),
        aggregation=TokenMean(),
        correction=TruncatedWeights(weight=TokenRatio(), upper=1.2),
        masks=(OffPolicySequences(max_drift=0.05), TopEntropyTokens(share=0.8)),
        kl=KLInLoss(coefficient=0.05, estimator=K2()),
        entropy=EntropyBonus(coefficient=0.01),
    )


def seed_objective(aggregation, clip=0.2):
    """DeepSeekMath, equation 3, or its tokens weighed equally."""
    return Objective(
        advantage=GroupMean(),
        scale=GroupStd(ddof=1, epsilon=1e-6),
        ratio=TokenRatio(),
        surrogate=Clipped(clip_low=clip, clip_high=clip),
        kl=KLInLoss(coefficient=0.05, estimator=K3()),
        aggregation=TokenMean() if aggregation == "token" else SequenceMeanTokenMean(),
    )


def engine_of(*, live, draw_ahead, uneven):
    if draw_ahead:
        return CopyingEngine()
    return UnevenEngine() if uneven else InProcessEngine() if live else RecordedEngine()


def make(
    *,
    accumulate=1,
    num_epochs=1,
    num_minibatches=1,
    group_size=4,
    ranks=1,
    dtype="float32",
    head_dim=8,
    iterations=2,
    layout="shared_prefix",
    max_tokens=None,
    fails_on_odd=False,
    aggregation="sequence",
    clip=0.2,
    objective=None,
    with_steps=False,
    live=False,
    engine=None,
    draw_ahead=False,
    uneven=False,
    fails_in=None,
    schedule=None,
    optimizer="AdamW",
    zero=None,
    max_rounds=None,
    num_solved_in_seven=None,
    is_controlled=False,
    lora=None,
    gradient_checkpointing=False,
    compiled=None,
    callbacks=(),
    lr=1e-2,
    **trainer_kwargs,
):
    if is_controlled:
        objective, callbacks = controlled.objective(), [*controlled.controllers(), controlled.States(), *callbacks]
    if isinstance(objective, str):
        objective = everything() if objective == "everything" else overlay(objective)
    module = GRPOModule(
        TinyPolicy(getattr(torch, dtype), head_dim=head_dim),
        objective or seed_objective(aggregation, clip),
        SamplingParams(max_new_tokens=12),
        partial(getattr(torch.optim, optimizer), lr=lr),
        prompts_per_iteration=4,
        group_size=group_size,
        num_epochs=num_epochs,
        num_minibatches=num_minibatches,
        engine=engine() if engine else engine_of(live=live, draw_ahead=draw_ahead, uneven=uneven),
        draw_ahead=draw_ahead,
        schedule=Schedule(**schedule) if schedule else None,
        groups=DynamicSampling(max_rounds) if max_rounds else None,
        layout=LAYOUTS[layout](),
        max_tokens_per_microbatch=max_tokens,
        max_failure_rate=1.0,
        lora=lora and LoRA(**lora),
        gradient_checkpointing=gradient_checkpointing,
        compile=None if compiled is None else Compile(**compiled),
        seed=3,
    )
    record = Record()
    if zero:
        trainer_kwargs["strategy"] = ZeROStrategy(**zero)
    settings = {
        "max_steps": iterations * num_epochs * num_minibatches,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 0.5,
        "devices": ranks,
        "strategy": "ddp" if ranks > 1 else "auto",
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_epochs": -1,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(
        **{**settings, **trainer_kwargs},
        callbacks=[
            TokenSum(fails_on_odd, num_solved_in_seven, fails_in),
            *([Steps()] if with_steps else []),
            GradientNorm(),
            record,
            *callbacks,
        ],
    )
    return module, Sums(), trainer, record


def run(**settings):
    module, data, trainer, record = make(**settings)
    trainer.fit(module, data)
    return record, module


def two_ranks(folder, **settings):
    """A run of five iterations on two ranks, or on `ranks`: what each of them has to tell."""
    (of_ranks,) = in_world(folder, [settings], ranks=settings.pop("ranks", 2))
    return of_ranks


def in_world(folder, runs, *, ranks):
    """Runs of five iterations, one after another in one world: for each, what each rank has to tell.

    Args:
        folder: For the files of this world.
        runs: For each run the settings of `make`; `save_at`, the arguments of each `SaveAt`; `second_update_from`, that
            of `SecondUpdateFrom`; and `ckpt_path`, to resume from, which an earlier run of this world may have saved.
        ranks: How many there are.
    """
    launch(rank_of_world, folder, [{"iterations": 5, **settings, "ranks": ranks} for settings in runs], num_ranks=ranks)
    return [[torch.load(folder / f"run.{i}.{rank}") for rank in range(ranks)] for i in range(len(runs))]


def rank_of_world(folder, runs):
    """One rank's part in each run, written to a file of its own."""
    (folder / f"ready.{os.environ['LOCAL_RANK']}").touch()
    for i, settings in enumerate(runs):
        torch.save(told(**settings), folder / f"run.{i}.{os.environ['LOCAL_RANK']}")
        gc.collect()


def told(*, save_at=(), second_update_from=None, ckpt_path=None, **settings):
    """What one rank has to tell: all agree in gradients, weights and metrics; tokens and slots are each one's own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    callbacks = [SaveAt(*arguments) for arguments in save_at]
    callbacks += [SecondUpdateFrom(second_update_from)] if second_update_from else []
    module, data, trainer, record = make(**settings, callbacks=callbacks)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return {
        "gradients": record.gradients,
        "weights": record.weights,
        "metrics": record.metrics,
        "num_left": record.num_left,
        "held_bytes": record.held_bytes,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "states": [state for c in trainer.callbacks if isinstance(c, controlled.States) for state in c.states],
        "optimizer": optimizer_states(trainer),
        "local_weights": sum(local(p).numel() for p in module.policy.parameters()),
        "slots": module.rollout.slots if module.rollout else (),
        "tokens": [c.token_ids for c in module.rollout.completions] if module.rollout else [],
    }
