"""Observer: sampled completions with their rewards and advantages."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_lightning.types import ConfigurationError


class SampleTable(Callback):
    """Prints some completions of the first prompts of an iteration, so that a person can watch it learn.

    Args:
        every_n_iterations: How often, from the first iteration on.
        num_prompts: Prompts shown.
        num_completions: Completions shown of each.
    """

    def __init__(self, every_n_iterations: int = 50, num_prompts: int = 2, num_completions: int = 3) -> None:
        super().__init__()
        for name, value in (("every_n_iterations", every_n_iterations), ("num_prompts", num_prompts)):
            if value < 1:
                raise ConfigurationError(f"SampleTable.{name} must be >= 1, got {value}.")
        self.every_n_iterations = every_n_iterations
        self.num_prompts = num_prompts
        self.num_completions = num_completions

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Print the table of an iteration that has just begun."""
        rollout: Any = pl_module.rollout
        if batch.starts_iteration and trainer.is_global_zero and rollout.iteration % self.every_n_iterations == 0:
            Console().print(self.table(rollout, pl_module.rewards, pl_module.advantages_B))

    def table(self, rollout: Any, rewards: Any, advantages_B: Any) -> Table:
        """A row for each completion shown."""
        table = Table("prompt", "completion", *rewards.names, "advantage", title=f"Iteration {rollout.iteration}")
        for p, prompt in enumerate(rollout.prompts[: self.num_prompts]):
            for g in range(min(self.num_completions, rollout.group_size)):
                b = p * rollout.group_size + g
                scores = [f"{value:.2f}" for value in rewards.values_BK[b].tolist()]
                text = Text(rollout.completions[b].text)
                table.add_row(Text(prompt.text if g == 0 else ""), text, *scores, f"{float(advantages_B[b]):+.2f}")
        return table
