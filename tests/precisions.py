"""Which precision each tensor of a run has: `see` is called on every rank of a world."""

import os

import loaded
import replay
import torch
from lightning.pytorch.callbacks import Callback
from shards import local
from torch import nn

from grpo_lightning.strategies import ZeROStrategy


def names(tensors):
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


class Seen(Callback):
    """The precisions of the trained weights, of what they are multiplied to, of gradients, moments, and copies."""

    def on_train_start(self, trainer, pl_module):
        self.products, self.table = [], {}
        linear = {name: m for name, m in pl_module.policy.named_modules() if isinstance(m, nn.Linear)}
        layer = next(m for name, m in linear.items() if name.removesuffix(".base_layer").endswith("down_proj"))
        layer.register_forward_hook(lambda module, args, output: self.products.append(output))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = [p for p in pl_module.policy.parameters() if p.requires_grad]
        self.table["weights"] = names(map(local, trained))
        self.table["gradients"] = names(p.grad for p in trained if p.grad is not None)
        if isinstance(trainer.strategy, ZeROStrategy):
            held = trainer.strategy.deepspeed_engine.optimizer.averaged_gradients.values()
            self.table["gradients"] = names(gradient for group in held for gradient in group)

    def on_train_end(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        inner = getattr(optimizer, "optimizer", optimizer)  # ZeRO's has the one that steps
        self.table["computed"] = names(self.products)
        self.table["moments"] = names(state["exp_avg"] for state in inner.state.values())
        flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # of ZeRO's stage 3, whose inner one lets go
        stepped = [p for group in inner.param_groups for p in group["params"]] if flat is None else flat
        self.table["stepped"] = names(stepped)


def see(folder, cases):
    """The table's row of each case: arguments of `loaded.make`."""
    for i, (kind, source, settings) in enumerate(cases):
        model, trainer, _ = loaded.make(kind, source, **settings)
        seen = Seen()
        trainer.callbacks.append(seen)
        trainer.fit(model, replay.Sums())
        torch.save(seen.table, folder / f"seen.{i}.{os.environ['LOCAL_RANK']}")
