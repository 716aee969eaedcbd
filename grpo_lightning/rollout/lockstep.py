"""Rollouts on weights in shards: every rank calls the model as often as the one that has the most to draw."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def lockstep(model: nn.Module, pass_by: Callable[[], None], device: torch.device) -> Iterator[None]:
    """Inside, a rank calls the model as often as it likes, and the others put the weights together with it.

    Before each call it tells the others that it makes one. A rank that has left passes by while another one calls::

        rank 0    prompt  token  token    token    .
        rank 1    prompt  token  pass by  pass by  .       .: all have left

    Args:
        model: Its weights are in shards; a call puts them together layer by layer, a collective.
        pass_by: Takes part in putting them together as one call of the model does.
        device: One that the process group can reduce on.
    """

    def announce(*_: Any) -> None:
        _anyone_calls(True, device)

    announcement = model.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        announcement.remove()
    while _anyone_calls(False, device):
        pass_by()


def _anyone_calls(mine: bool, device: torch.device) -> bool:
    """Whether a rank makes a call. A collective."""
    calls = torch.tensor(int(mine), device=device)
    torch.distributed.all_reduce(calls, torch.distributed.ReduceOp.MAX)
    return bool(calls)
