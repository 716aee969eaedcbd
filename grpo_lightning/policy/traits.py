"""What a model shows when it is asked, which needs its weights."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from grpo_lightning.functional.head import Head


class HeadKind(NamedTuple):
    """What a model makes of its last hidden states."""

    softcap: float | None = None
    is_plain: bool = False
    """Whether the logits are those of `Head` with the output embedding's weights."""


@torch.no_grad()
def head_kind(model: PreTrainedModel) -> HeadKind:
    """What the model's own logits show: some families scale them after the head, or have a head of their own.

    Asking the model is safer than a list of names. A head that something wraps (an adapter) is left to the model too.
    """
    head, parameter = model.get_output_embeddings(), next(model.parameters())
    if type(head) is not nn.Linear or parameter.is_meta:
        return HeadKind()
    config = model.config.get_text_config()
    was_training = model.training
    model.eval()
    input_ids = torch.arange(min(4, config.vocab_size), device=parameter.device)[None]
    logits = model(input_ids=input_ids, use_cache=False).logits
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    model.train(was_training)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadKind(softcap, torch.equal(Head(head.weight, head.bias, softcap).logits(hidden), logits))


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a policy found out about its model."""

    lean_layers: tuple[str, ...]
    """The names of those that `make_lean` replaced."""
    head: HeadKind
    follows_segments: bool
