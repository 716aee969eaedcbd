"""A rollout: a group of completions of each prompt."""

from collections.abc import Sequence

from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.types import Coordinates, GenerationRequest, Prompt, Rollout, SamplingParams


def draw_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    *,
    slots: Sequence[int],
    group_size: int,
    sampling: SamplingParams,
    coordinates: Coordinates,
) -> Rollout:
    """Draw a group of completions of each of one rank's prompts.

    Args:
        engine: Draws them.
        prompts: Of the iteration, over all ranks.
        slots: Which of them are this rank's.
        group_size: G, completions per prompt.
        sampling: How they are drawn.
        coordinates: Where in the run the rollout stands.
    """
    requests = [GenerationRequest(slot=s, token_ids=prompts[s].token_ids, num_completions=group_size) for s in slots]
    completions = engine.generate(requests, sampling, coordinates)
    return Rollout(
        iteration=coordinates.iteration,
        slots=tuple(slots),
        prompts=tuple(prompts[s] for s in slots),
        completions=tuple(completions),
    )
