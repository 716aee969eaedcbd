"""Learning-rate schedules, and settings that win over a checkpoint's."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grpo_lightning.types import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over the optimizer's steps: a linear warm-up, then constant, or down to a share of itself.

    Args:
        decay: The shape after the warm-up; linear and cosine end at the last step of the run (`trainer.max_steps`).
        warmup_steps: Steps of the warm-up, >= 0; the first step already moves.
        final_fraction: What is left of the learning rate at the end, in [0, 1].
    """

    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigurationError(f"model.schedule.warmup_steps must be >= 0, got {self.warmup_steps}.")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigurationError(f"model.schedule.final_fraction must be in [0, 1], got {self.final_fraction}.")

    def factor(self, step: int, num_steps: float) -> float:
        """The share of the learning rate at optimizer step `step` (from 0) of `num_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1.0, num_steps - self.warmup_steps))
        remaining = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_fraction + (1 - self.final_fraction) * remaining

    def scheduler(self, optimizer: Optimizer, num_steps: float) -> LambdaLR:
        """The schedule as a scheduler of torch.

        Raises:
            ConfigurationError: The shape ends at the run's last step, and the run has none.
        """
        if self.decay != "constant" and math.isinf(num_steps):
            raise ConfigurationError(
                f"model.schedule.decay: {self.decay} ends at the last step of the run, so it needs trainer.max_steps "
                "or trainer.max_epochs, got neither."
            )
        return LambdaLR(optimizer, lambda step: self.factor(step, num_steps))


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the configuration says of each parameter group: learning rate, betas, weight decay ..."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: Optimizer, scheduler: LambdaLR, configured: list[dict[str, Any]]) -> list[str]:
    """Make the configuration win over what a checkpoint restored; returns what differed, in words."""
    differences = []
    for number, (group, wanted) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
        base, restored_lr, has_base = wanted["initial_lr"], group["lr"], group.get("initial_lr") == wanted["initial_lr"]
        for name, value in wanted.items():
            restored = group.get("initial_lr") if name == "lr" else group.get(name)
            new = base if name == "lr" else value
            if name != "initial_lr" and restored != new:
                differences.append(f"{name}: {new} (the checkpoint had {restored})")
            group[name] = value
        scheduler.base_lrs[number] = base
        group["lr"] = base * scheduler.lr_lambdas[number](scheduler.last_epoch)
        if has_base and group["lr"] != restored_lr:
            differences.append(f"lr by the schedule: {group['lr']} (the checkpoint had {restored_lr})")
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return list(dict.fromkeys(differences))
