"""What an engine is asked for: a group of completions of each prompt, or one."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lightning.rollout.ahead import RolloutAhead
from grpo_lightning.rollout.engine import DrawsAhead, RolloutEngine
from grpo_lightning.types import Coordinates, EvaluationPrompt, GenerationRequest, Prompt, Rollout, SamplingParams


def draw_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt] | Mapping[int, Prompt],
    *,
    slots: Sequence[int],
    group_size: int,
    sampling: SamplingParams,
    coordinates: Coordinates,
) -> Rollout:
    """Draw a group of completions of each of one rank's prompts.

    Args:
        engine: Draws them.
        prompts: Of the iteration, over all ranks, by slot.
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


def begin_groups(
    engine: DrawsAhead,
    prompts: Sequence[Prompt],
    *,
    slots: Sequence[int],
    group_size: int,
    sampling: SamplingParams,
    coordinates: Coordinates,
) -> RolloutAhead:
    """As `draw_groups`, from the weights of this moment, but in the background."""
    requests = [GenerationRequest(slot=s, token_ids=prompts[s].token_ids, num_completions=group_size) for s in slots]
    draw = engine.begin(requests, sampling, coordinates)
    return RolloutAhead.drawn_by(draw, iteration=coordinates.iteration, prompts=prompts, slots=slots)


def draw_each(
    engine: RolloutEngine, prompts: Sequence[EvaluationPrompt], sampling: SamplingParams, coordinates: Coordinates
) -> list[dict[str, Any]]:
    """Draw one completion of each prompt, and describe it in plain containers, which Lightning moves and JSON knows.

    Returns:
        Of each prompt its number ``slot``, the ``prompt``, the ``completion``, its ``finish_reason`` (``eos``,
        ``stop``, ``length``) and the row's other ``columns``.
    """
    requests = [GenerationRequest(slot=s, token_ids=p.token_ids, num_completions=1) for s, p in prompts]
    return [
        {
            "slot": slot,
            "prompt": prompt.text,
            "completion": completion.text,
            "finish_reason": completion.finish_reason.value,
            "columns": dict(prompt.columns),
        }
        for (slot, prompt), completion in zip(prompts, engine.generate(requests, sampling, coordinates), strict=True)
    ]
