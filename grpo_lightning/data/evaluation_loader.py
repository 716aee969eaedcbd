"""Batches of held-out prompts, shared out over the ranks."""

from collections.abc import Iterator, Sequence

from grpo_lightning.types import EvaluationPrompt, Prompt


class EvaluationLoader:
    """Batches of held-out prompts: rank r of W takes slots r, r + W, ...; every rank has equally many batches.

    It is already shared out, so Lightning has no sampler to replace.

    Args:
        prompts: All held-out prompts; a prompt's place is its slot.
        batch_size: Prompts of a batch over all ranks.
        rank: Of this process.
        world_size: Number of processes.

    Example:
        >>> prompts = [Prompt(index=i, token_ids=(7,), text="") for i in range(5)]
        >>> loader = EvaluationLoader(prompts, batch_size=4, rank=1, world_size=2)
        >>> [[prompt.slot for prompt in batch] for batch in loader]
        [[1, 3], []]
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, rank: int, world_size: int) -> None:
        self.prompts = [EvaluationPrompt(slot, prompt) for slot, prompt in enumerate(prompts)]
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[list[EvaluationPrompt]]:
        for first in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[first : first + self.batch_size]
            yield [prompt for prompt in batch if prompt.slot % self.world_size == self.rank]
