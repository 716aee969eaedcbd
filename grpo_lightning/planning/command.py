"""`grpo-lightning plan --config run.yaml`: what a run needs of each GPU's memory."""

import math
import re

from jsonargparse import ArgumentParser

from grpo_lightning.planning.budget import Budget, budget_of
from grpo_lightning.planning.settings import Settings
from grpo_lightning.types import ConfigurationError

GIB = 2**30


def main(args: list[str]) -> None:
    """Run the command with the given arguments, without its name."""
    of_a_run = next((arg for arg in args if re.match(r"--(model|data|trainer)\b", arg)), None)
    if of_a_run is not None:
        raise ConfigurationError(
            f"plan takes --config, --ranks, --gpu_memory and --prompt_tokens, got {of_a_run}.\n"
            "It reads all other settings from files: put this one into a YAML file, and give it as a further --config."
        )
    parser = ArgumentParser(prog="grpo-lightning plan", exit_on_error=False)
    parser.add_argument("--config", action="append", help="A run's config; a later one overrides the first.")
    parser.add_function_arguments(plan, skip={"configs"})
    given = parser.parse_args(args).as_dict()
    plan(given.pop("config") or [], **given)


def plan(configs: list[str], ranks: int = 1, gpu_memory: float | None = None, prompt_tokens: int | None = None) -> None:
    """Print the GiB that each rank needs, by what needs them, and whether they fit.

    Args:
        configs: YAML files.
        ranks: GPUs over all machines.
        gpu_memory: GiB of one GPU; null for no verdict.
        prompt_tokens: Of the longest prompt; null for data.max_prompt_tokens.

    Raises:
        ConfigurationError: A setting that is needed is missing or out of its range.
    """
    if not configs:
        raise ConfigurationError("plan: --config must name a file.")
    if ranks < 1:
        raise ConfigurationError(f"--ranks must be >= 1, got {ranks}.")
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise ConfigurationError(f"--gpu_memory must be > 0, in GiB, got {gpu_memory}.")
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ConfigurationError(f"--prompt_tokens must be >= 1, got {prompt_tokens}.")
    print(table(budget_of(Settings(configs), ranks=ranks, prompt_tokens=prompt_tokens), gpu_memory))


def table(budget: Budget, gpu_memory: float | None) -> str:
    """The budget in GiB, one line for each thing that takes memory, and the sums at the two peaks."""
    rows = [(name, *peaks) for name, peaks in budget.lines.items() if any(peaks)]
    rows.append(("total", budget.rollout, budget.update))
    lines = [budget.headline, f"{'GiB per rank':<34}{'rollout':>10}{'update':>10}"]
    lines += [f"{name:<34}{rollout / GIB:>10.2f}{update / GIB:>10.2f}" for name, rollout, update in rows]
    if budget.on_cpu:
        lines.append(f"{'in the memory of the CPU':<34}{budget.on_cpu / GIB:>10.2f}{budget.on_cpu / GIB:>10.2f}")
    if gpu_memory is not None:
        left = gpu_memory - max(budget.rollout, budget.update) / GIB
        verdict = f"fits, {left:.2f} GiB are left" if left >= 0 else f"does not fit, {-left:.2f} GiB are missing"
        lines.append(f"Of {gpu_memory:g} GiB: {verdict}. The CUDA context, NCCL and fragmentation take some more.")
    return "\n".join(lines)
