"""Whether the completions of a prompt can share its keys and values, and what that saves."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from grpo_lightning.rollout.attention import AttentionPattern
from grpo_lightning.rollout.decoding import next_logits
from grpo_lightning.rollout.prefill import prefill
from grpo_lightning.rollout.prefix import SharingCache
from grpo_lightning.types import GenerationRequest


def tokens_saved(requests: Sequence[GenerationRequest]) -> float:
    """The tokens, per completion, whose keys and values need not be held again.

    Two prompts of 10 and 20 tokens with 4 completions each: 3 copies of either are saved, 90 tokens, or 11.25 for each
    of the 8 completions.
    """
    num_completions = sum(request.num_completions for request in requests)
    held = sum(len(request.token_ids) * request.num_completions for request in requests)
    needed = sum(map(len, {request.token_ids for request in requests if request.num_completions}))
    return (held - needed) / max(num_completions, 1)


@torch.no_grad()
def can_share(model: PreTrainedModel, pattern: AttentionPattern) -> bool:
    """Whether the model gives a token after a shared prompt the logits that it gives it in a plain forward.

    Asking the model is safer than a list of names. Whatever goes wrong in the attempt means no.
    """
    prompts, next_tokens = [[0, 1, 2], [2]], [1, 2, 0]
    prompt_of_row = [0, 1, 0]
    lengths = [len(prompts[prompt]) for prompt in prompt_of_row]
    device = model.device
    try:
        cache = SharingCache()
        cache.begin(num_rows=3, longest_prompt=3)
        cache.append(prefill(model, prompts, pattern), prompt_of_row, lengths, names=prompt_of_row)
        tokens_R, positions_R = torch.tensor(next_tokens, device=device), torch.tensor(lengths, device=device)
        found_RV = next_logits(model, cache, pattern, tokens_R, positions_R)
        sequences = [[*prompts[prompt], token] for prompt, token in zip(prompt_of_row, next_tokens, strict=True)]
        expected_RV = torch.stack(
            [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1] for ids in sequences]
        )
    except Exception:
        return False
    # Half precision rounds to 2^-8; a model that ignores its prompts is off by the size of the logits.
    tolerance = 0.05 if found_RV.dtype.itemsize == 2 else 1e-3
    return bool((found_RV - expected_RV).norm() <= tolerance * expected_RV.norm())
