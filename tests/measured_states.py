"""What a rank of ZeRO holds of gradients and of the optimizer, at the moment at which there is most of each."""

from itertools import chain

import replay
import torch
from lightning.pytorch.callbacks import Callback
from shards import held_bytes, parts, storages

CUT = {"stage3_param_persistence_threshold": 0}


class AtStep(Callback):
    """Measures the gradients before the step, and in the step the copy of them that ZeRO steps from, and the states."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not hasattr(self, "held"):
            optimizer.optimizer.register_step_post_hook(self.in_step)
        self.held = held_bytes(trainer)
        self.weights = storages(chain(*map(parts, pl_module.policy.parameters())))

    def in_step(self, optimizer, *_):
        stepped = list(chain(*(group["params"] for group in optimizer.param_groups)))
        self.held["gradients"] += sum(storages(p.grad for p in stepped if p.grad is not None).values())
        states = chain(*(state.values() for state in optimizer.state.values()))
        of_optimizer = storages(part for part in chain(stepped, states) if torch.is_tensor(part))
        self.held["optimizer"] = sum(size for key, size in of_optimizer.items() if key not in self.weights)


def rank(folder, runs):
    """Write what this rank held in each run."""
    for i, (stage, precision) in enumerate(runs):
        at_step = AtStep()
        zero = {"stage": stage, "zero_settings": CUT if stage == 3 else None}
        module, data, trainer, _ = replay.make(
            zero=zero, ranks=2, iterations=1, head_dim=32, precision=precision, callbacks=(at_step,)
        )
        trainer.fit(module, data)
        torch.save(at_step.held, folder / f"held.{i}.{trainer.global_rank}")
