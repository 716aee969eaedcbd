"""What ranks hold after a model is loaded and cut: `load` and `measure` are called on every rank of a world."""

import os
import resource
from functools import partial
from pathlib import Path

import replay
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from shards import local, whole

from grpo_lightning import GRPOModule
from grpo_lightning.policy import CharacterPolicy, LoRA, PretrainedPolicy
from grpo_lightning.strategies import FSDP2Strategy, ZeROStrategy
from grpo_lightning.types import SamplingParams

SOURCES = {"character": CharacterPolicy, "pretrained": PretrainedPolicy}


class Loaded(Callback):
    """The weights, whole, and how many this rank holds, before the first update."""

    def on_train_start(self, trainer, pl_module):
        models = {"policy": pl_module.policy, "reference": pl_module.reference}
        held = {name: dict(m.model.named_parameters()) for name, m in models.items() if hasattr(m, "parameters")}
        self.weights = {m: {name: whole(p).detach().clone() for name, p in ps.items()} for m, ps in held.items()}
        self.num_local = {m: sum(local(p).numel() for p in parameters.values()) for m, parameters in held.items()}
        self.trained = [name for name, p in held["policy"].items() if p.requires_grad]
        self.eos_token_ids = pl_module.policy.eos_token_ids
        self.traits = pl_module.policy.traits


class Measured(GRPOModule):
    """Ends the run where its models are loaded, and tells the peak of what loading took, in bytes."""

    def configure_model(self):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        super().configure_model()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        torch.distributed.barrier()
        self.report(peak * 1024)
        os._exit(0)


def make(
    kind,
    source,
    *,
    strategy,
    lora=None,
    with_reference=True,
    precision="32-true",
    compute_dtype=None,
    module=GRPOModule,
):
    """A module and its Trainer.

    Args:
        kind: Of `SOURCES`.
        source: Its settings.
        strategy: A registered name; of stage 3 of ZeRO, small weights are cut too.
        lora: Settings of `LoRA`.
        with_reference: Whether there is a penalty that needs one.
        precision: The Trainer's.
        compute_dtype: Of fsdp2.
        module: The class.
    """
    model = module(
        SOURCES[kind](**source),
        replay.seed_objective("token") if with_reference else replay.overlay("dr_grpo"),
        SamplingParams(max_new_tokens=4),
        partial(torch.optim.AdamW, lr=1e-3),
        prompts_per_iteration=4,
        group_size=2,
        engine=replay.RecordedEngine(),
        lora=lora and LoRA(**lora),
        seed=3,
    )
    if strategy == "deepspeed_3":
        strategy = ZeROStrategy(stage=3, zero_settings={"stage3_param_persistence_threshold": 0})
    if compute_dtype is not None:
        strategy = FSDP2Strategy(compute_dtype=compute_dtype)
    loaded = Loaded()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "2")),
        strategy=strategy,
        precision=precision,
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[replay.TokenSum(), loaded],
    )
    return model, trainer, loaded


def load(folder, cases):
    """What this rank has before the first update of each case: arguments of `make`."""
    rank = os.environ["LOCAL_RANK"]
    for i, (kind, source, settings) in enumerate(cases):
        model, trainer, loaded = make(kind, source, **settings)
        trainer.fit(model, replay.Sums())
        names = ("weights", "num_local", "trained", "eos_token_ids", "traits")
        torch.save({name: getattr(loaded, name) for name in names}, folder / f"case.{i}.{rank}")


def measure(folder, kind, source, settings):
    """The peak of what this rank's memory grew by while the models were loaded, in bytes."""
    model, trainer, _ = make(kind, source, module=Measured, **settings)
    file = Path(folder) / f"peak.{os.environ['LOCAL_RANK']}"
    model.report = lambda peak: file.write_text(str(peak))
    trainer.fit(model, replay.Sums())
