"""Observer: sampled completions with their rewards and advantages."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from grpo_lightning.types import Completion, ConfigurationError, Rewards, Rollout


class SampleTable(Callback):
    """Prints some groups of an iteration, so that a person can watch the policy learn, or learn to cheat.

    A group's completions are shown from the best to the worst, with every reward, their weighted total and the
    advantage that the update gives them.

    Args:
        every_n_iterations: How often, from the first iteration on.
        num_prompts: Prompts shown, the first of the iteration.
        num_completions: Completions shown of each, evenly spread from the best to the worst.
        max_characters: Of a prompt or a completion; a longer one loses its middle.

    Raises:
        ConfigurationError: An argument is below 1.
    """

    def __init__(
        self,
        every_n_iterations: int = 50,
        num_prompts: int = 2,
        num_completions: int = 4,
        max_characters: int = 400,
    ) -> None:
        super().__init__()
        arguments = {
            "every_n_iterations": every_n_iterations,
            "num_prompts": num_prompts,
            "num_completions": num_completions,
            "max_characters": max_characters,
        }
        for name, value in arguments.items():
            if value < 1:
                raise ConfigurationError(f"SampleTable.{name} must be >= 1, got {value}.")
        self.every_n_iterations = every_n_iterations
        self.num_prompts = num_prompts
        self.num_completions = num_completions
        self.max_characters = max_characters
        self._shown: Rollout | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Print the table of an iteration whose update has begun."""
        rollout: Rollout | None = getattr(pl_module, "rollout", None)
        if not trainer.is_global_zero or rollout is None or rollout is self._shown:
            return
        self._shown = rollout
        if rollout.iteration % self.every_n_iterations == 0:
            # The console that the progress bar draws on: what it prints stands above the bar.
            get_console().print(self.table(rollout, pl_module.rewards, pl_module.advantages_B))

    def table(self, rollout: Rollout, rewards: Rewards, advantages_B: Tensor) -> Table:
        """A row for each completion shown, after its prompt."""
        table = Table(title=f"Iteration {rollout.iteration + 1}", title_justify="left", show_lines=False)
        table.add_column("completion", ratio=1, overflow="fold")
        names = (*rewards.names, "total", "advantage") if len(rewards.names) > 1 else (*rewards.names, "advantage")
        for name in (*names, "tokens"):
            table.add_column(name, justify="right", no_wrap=name in ("advantage", "tokens"))
        totals = rewards.totals_B.tolist()
        for p, prompt in enumerate(rollout.prompts[: self.num_prompts]):
            table.add_section()
            table.add_row(Text(self._cut(prompt.text), style="bold"))
            group = range(p * rollout.group_size, (p + 1) * rollout.group_size)
            for b in self._spread(group, totals):
                scores = [*_scores(rewards, b), *([_number(totals[b])] if len(rewards.names) > 1 else [])]
                advantage = f"{float(advantages_B[b]):+.2f}"
                completion = rollout.completions[b]
                table.add_row(Text(self._cut(completion.text)), *scores, advantage, _length(completion))
        return table

    def _spread(self, group: Sequence[int], totals: Sequence[float]) -> list[int]:
        """Some of a group, evenly spread from the best to the worst; those without a total come last."""
        ranked = sorted(group, key=lambda b: (math.isnan(totals[b]), 0.0 if math.isnan(totals[b]) else -totals[b]))
        if self.num_completions >= len(ranked):
            return ranked
        step = (len(ranked) - 1) / max(self.num_completions - 1, 1)
        return [ranked[round(i * step)] for i in range(self.num_completions)]

    def _cut(self, text: str) -> str:
        """The beginning and the end, where the answer usually stands."""
        if len(text) <= self.max_characters:
            return text
        half = self.max_characters // 2
        return f"{text[: self.max_characters - half]} […] {text[len(text) - half :]}"


def _scores(rewards: Rewards, b: int) -> list[str]:
    values, failed = rewards.values_BK[b].tolist(), rewards.failed_BK[b].tolist()
    return ["failed" if is_failed else _number(value) for value, is_failed in zip(values, failed, strict=True)]


def _number(value: float) -> str:
    """Two decimals; a dash where a reward does not apply."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def _length(completion: Completion) -> str:
    """The number of tokens; a scissors mark where the limit cut the completion off."""
    return f"{len(completion.token_ids)}{' ✂' if completion.is_truncated else ''}"
