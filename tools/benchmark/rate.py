"""How fast this machine multiplies matrices of a model's own shapes."""

import time
from collections.abc import Callable

import torch

from tools.benchmark.workloads import Workload

HEAD_ROWS = 512
"""The head's product is measured on so many rows: all of them would need gigabytes for their logits."""


def products(workload: Workload, num_tokens: int) -> list[tuple[int, tuple[int, int, int]]]:
    """How often the update's forward pass takes which product, as (rows, inner, columns).

    Args:
        workload: Whose model it is.
        num_tokens: Of the update.
    """
    model = workload.model
    head_rows = min(num_tokens, HEAD_ROWS)
    return [
        (4 * model.layers, (num_tokens, model.hidden, model.hidden)),
        (2 * model.layers, (num_tokens, model.hidden, model.intermediate)),
        (model.layers, (num_tokens, model.intermediate, model.hidden)),
        (max(num_tokens // head_rows, 1), (head_rows, model.hidden, model.vocabulary)),
    ]


def matmul_rate(workload: Workload, num_tokens: int, *, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second over the products of the update's forward pass."""
    operations = seconds = 0.0
    for count, (rows, inner, columns) in products(workload, num_tokens):
        left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        operations += count * 2 * rows * inner * columns
        seconds += count * _best_seconds(lambda a=left, b=right: torch.nn.functional.linear(a, b))
    return operations / seconds


def _best_seconds(compute: Callable[[], object], *, num_trials: int = 5, least: float = 0.05) -> float:
    """Seconds per call: the best of some trials, each of as many calls as fill `least` seconds."""
    compute()
    start = time.perf_counter()
    compute()
    num_calls = max(1, int(least / max(time.perf_counter() - start, 1e-9)))
    best = float("inf")
    for _ in range(num_trials):
        start = time.perf_counter()
        for _ in range(num_calls):
            compute()
        best = min(best, (time.perf_counter() - start) / num_calls)
    return best
