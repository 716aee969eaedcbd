"""Controller: prompts that the policy has learned are not drawn again."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.controllers import Controlled, Controller
from grpo_lightning.types import ConfigurationError


class PromptRetirement(Controller):
    """Retires a prompt for good when its pass rate over its last groups reaches a bound.

    No-Positive-Resampling of ScaleRL, with 0.9 (https://arxiv.org/abs/2510.13786). A completion passes by a total
    reward of at least `model.evaluation.threshold`; one that could not be scored does not count. As many prompts as
    an iteration has are never retired, so that the run goes on, and it is said.

    Args:
        pass_rate: The bound, in (0, 1].
        window: Over how many of the prompt's last groups, >= 1; it is not judged before it has had as many.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(self, pass_rate: float = 0.9, window: int = 1) -> None:
        super().__init__()
        if not 0 < pass_rate <= 1:
            raise ConfigurationError(f"PromptRetirement.pass_rate must be in (0, 1], got {pass_rate}.")
        if window < 1:
            raise ConfigurationError(f"PromptRetirement.window must be >= 1, got {window}.")
        self.pass_rate = pass_rate
        self.window = window
        self._history: dict[int, list[tuple[int, int]]] = {}
        self._has_told = False

    def state_dict(self) -> dict[str, Any]:
        """Of each prompt drawn: passed and scored completions of its last groups. Who is retired, the stream knows."""
        return {"history": {index: list(groups) for index, groups in self._history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the saved history."""
        self._history = {index: [tuple(g) for g in groups] for index, groups in state_dict["history"].items()}

    def on_update_end(self, trainer: Trainer, module: Controlled, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """Judge the prompts that were drawn since the last update."""
        for outcome in module.outcomes:
            if outcome.num_scored and self._is_learned(outcome.prompt_index, outcome.num_solved, outcome.num_scored):
                self._retire(module, outcome.prompt_index)

    def _is_learned(self, index: int, num_solved: int, num_scored: int) -> bool:
        groups = [*self._history.get(index, []), (num_solved, num_scored)][-self.window :]
        self._history[index] = groups
        solved, scored = map(sum, zip(*groups, strict=True))
        return len(groups) == self.window and solved >= self.pass_rate * scored

    def _retire(self, module: Controlled, index: int) -> None:
        if module.prompts.num_others(frozenset({index})) >= module.shape.prompts_per_iteration:
            module.prompts.retire(index)
        elif not self._has_told:
            self._has_told = True
            rank_zero_info("PromptRetirement: no further prompt is retired, or an iteration would repeat some.")
