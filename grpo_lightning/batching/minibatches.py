"""From a scored rollout to the samples of each minibatch, and what a minibatch counts over all ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grpo_lightning.batching.experience import Place, Sample
from grpo_lightning.batching.shape import IterationShape
from grpo_lightning.types import Completion, MinibatchCounts, Rollout


def cut_into_minibatches(rollout: Rollout, learned_B: Tensor, shape: IterationShape) -> list[list[Sample]]:
    """Whole groups in global order: which minibatch a prompt falls into does not depend on the ranks.

    Args:
        rollout: What this rank drew; the slots count prompts over all ranks.
        learned_B: bool, the completions that the update learns from. The others leave no sample, and neither does one
            without a loss token.
        shape: Slot s belongs to minibatch ``s // shape.prompts_per_minibatch``.

    Returns:
        A list per minibatch of the iteration, some of which may be empty.
    """
    minibatches: list[list[Sample]] = [[] for _ in range(shape.num_minibatches)]
    lengths = [
        num_loss_tokens(c) if is_learned else 0
        for c, is_learned in zip(rollout.completions, learned_B.tolist(), strict=True)
    ]
    prompt_ids = [torch.tensor(prompt.token_ids) for prompt in rollout.prompts]
    for b, completion in enumerate(rollout.completions):
        if lengths[b]:
            p, index = divmod(b, rollout.group_size)
            sample = Sample(
                slot=rollout.slots[p],
                index=index,
                prompt_ids=prompt_ids[p],
                completion_ids=torch.tensor(completion.token_ids),
                loss_mask=_loss_mask(completion),
                group_tokens=sum(lengths[b - index : b - index + rollout.group_size]),
            )
            minibatches[sample.slot // shape.prompts_per_minibatch].append(sample)
    return minibatches


def global_counts(
    minibatches: Sequence[Sequence[Sample]], sum_over_ranks: Callable[[Sequence[float]], list[float]]
) -> list[MinibatchCounts]:
    """What each minibatch counts over all ranks: the denominators of its loss.

    Args:
        minibatches: This rank's samples. Groups are never spread over ranks, so that groups are counted once.
        sum_over_ranks: Adds up each value over all ranks; called once.
    """
    local = [
        (sum(int(s.loss_mask.sum()) for s in samples), len(samples), len({s.slot for s in samples}))
        for samples in minibatches
    ]
    total = sum_over_ranks([float(n) for counts in local for n in counts])
    return [MinibatchCounts(*map(int, total[3 * m : 3 * m + 3])) for m in range(len(minibatches))]


def sampler_logprobs(rollout: Rollout) -> dict[Place, Tensor]:
    """What the rollout engine says of the tokens that it drew, in float64, by the completions' places."""
    places = ((slot, index) for slot in rollout.slots for index in range(rollout.group_size))
    rows = (torch.tensor(completion.sampler_logprobs, dtype=torch.float64) for completion in rollout.completions)
    return dict(zip(places, rows, strict=True))


def num_loss_tokens(completion: Completion) -> int:
    """How many tokens of a completion the policy drew itself."""
    return len(completion.token_ids) if completion.loss_mask is None else sum(completion.loss_mask)


def _loss_mask(completion: Completion) -> Tensor:
    if completion.loss_mask is not None:
        return torch.tensor(completion.loss_mask)
    return torch.ones(len(completion.token_ids), dtype=torch.bool)
