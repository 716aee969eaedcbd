"""What a checkpoint of a GRPO run holds beside weights and optimizer, and at which moment of the loop it stands.

Gradients in the middle of an accumulation window are not saved, so a checkpoint always stands at a window's end. A save
that falls inside a window (a time interval, a signal, an exception) is rewound to the end of the window before, whose
weights and optimizer are still the current ones.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.batching import Layout
from grpo_lightning.batching.experience import Experience, merged_state
from grpo_lightning.rollout import RolloutAhead
from grpo_lightning.rollout.ahead import merged as merged_rollout
from grpo_lightning.types import Coefficients, ConfigurationError, Prompt

KEY = "grpo_lightning"
Merge = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Prompts(Protocol):
    """Where the training prompts come from."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """All of them."""

    def state_dict(self) -> dict[str, Any]:
        """Which one is next, in plain containers."""


class Run(Protocol):
    """What of the module is in a checkpoint, weights and optimizer aside."""

    iteration: int
    tokens_generated: int
    tokens_trained: int
    seconds_by_phase: dict[str, float]
    experience: Experience | None
    draw_ahead: bool
    ahead: RolloutAhead | None
    layout: Layout
    coefficients: Coefficients
    """Of the regularisers, at the moment."""
    configured_coefficients: Coefficients
    """Those that the settings say to begin with."""

    @property
    def prompts(self) -> Prompts:
        """Where the training prompts come from."""


@dataclass
class Boundary:
    """The end of the last accumulation window: what the module and the loops were."""

    iteration: int = 0
    tokens_generated: int = 0
    tokens_trained: int = 0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    stream: dict[str, Any] | None = None
    experience: Experience | None = None
    ahead: RolloutAhead | None = None
    coefficients: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Those that callbacks have moved: from which setting, and to what."""
    loops: dict[str, Any] = field(default_factory=dict)
    is_current: bool = True
    """False inside a window."""

    def mark(self, run: Run) -> None:
        """A window ends here; the loops' state is known later."""
        self.iteration = run.iteration
        self.tokens_generated, self.tokens_trained = run.tokens_generated, run.tokens_trained
        self.seconds_by_phase = dict(run.seconds_by_phase)
        self.stream = run.prompts.state_dict()
        self.experience, self.ahead = run.experience, run.ahead
        pairs = zip(Coefficients._fields, run.configured_coefficients, run.coefficients, strict=True)
        self.coefficients = {name: (configured, now) for name, configured, now in pairs if configured != now}
        self.is_current = True

    def write(
        self,
        checkpoint: dict[str, Any],
        settings: dict[str, int],
        of_iteration: dict[str, str],
        base_checksum: int | None,
    ) -> None:
        """Put the boundary into a checkpoint. Every rank calls it: the first one gathers experience and rollout.

        It waits for a rollout that is being drawn, whose weights a resumed run would not have any more.

        Args:
            checkpoint: Lightning's.
            settings: By YAML key, what a run cannot change.
            of_iteration: By YAML key, what it cannot change in the middle of an iteration.
            base_checksum: Of frozen weights that are not in the checkpoint, under an adapter or of the reference.
        """
        if not self.is_current:
            checkpoint["loops"]["fit_loop"] = deepcopy(self.loops)
        _begin_validation_anew(checkpoint["loops"]["fit_loop"])
        checkpoint[KEY] = {
            "iteration": self.iteration,
            "tokens_generated": self.tokens_generated,
            "tokens_trained": self.tokens_trained,
            "seconds_by_phase": dict(self.seconds_by_phase),
            "stream": self.stream,
            "experience": None if self.experience is None else _gathered(self.experience.state_dict(), merged_state),
            "ahead": None if self.ahead is None else _gathered(self.ahead.state_dict(), merged_rollout),
            "coefficients": self.coefficients,
            "settings": settings,
            "of_iteration": of_iteration,
            "base_checksum": base_checksum,
        }


def is_of_grpo(checkpoint: dict[str, Any]) -> bool:
    """Whether a GRPO run has written it."""
    return KEY in checkpoint


def own_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `Boundary.write` put into a checkpoint.

    Raises:
        ConfigurationError: There is nothing of the kind.
    """
    if not is_of_grpo(checkpoint):
        raise ConfigurationError("--ckpt_path: the checkpoint was not written by a GRPO run of this package.")
    state: dict[str, Any] = checkpoint[KEY]
    return state


def take_up(
    run: Run,
    state: dict[str, Any],
    settings: dict[str, int],
    of_iteration: dict[str, str],
    *,
    rank: int,
    world_size: int,
) -> None:
    """Put a checkpoint's state into the module, all but what needs `run.prompts`, which are not there yet.

    Args:
        run: The module.
        state: What `own_state` found.
        settings: The module's, those that `Boundary.write` was given.
        of_iteration: Likewise.
        rank: Of this process.
        world_size: How many there are; the run that wrote the checkpoint may have had others.

    Raises:
        ConfigurationError: See `check_settings`.
    """
    check_settings(state, settings)
    if state["experience"] is not None:
        _check_iteration(state["of_iteration"], of_iteration)
    run.iteration = state["iteration"]
    run.tokens_generated, run.tokens_trained = state["tokens_generated"], state["tokens_trained"]
    run.seconds_by_phase = dict(state["seconds_by_phase"])
    run.coefficients = _resumed(state["coefficients"], run.configured_coefficients)
    if state["experience"] is not None:
        run.experience = Experience.from_state_dict(
            state["experience"],
            rank=rank,
            world_size=world_size,
            accumulate_grad_batches=settings["trainer.accumulate_grad_batches"],
            layout=run.layout,
        )


def rollout_ahead(
    run: Run, state: dict[str, Any], of_iteration: dict[str, str], *, rank: int, world_size: int
) -> RolloutAhead | None:
    """This rank's share of the rollout that a checkpoint holds for the next iteration; None where it has none.

    It is lost, and so drawn again, where the run draws otherwise now: with other settings, or when it is due.

    Args:
        run: The module.
        state: What `own_state` found.
        of_iteration: See `Boundary.write`.
        rank: See `take_up`.
        world_size: See `take_up`.
    """
    ahead = state["ahead"]
    if ahead is None:
        return None
    settings = [
        {k: v for k, v in s.items() if k.startswith("model.sampling")} for s in (state["of_iteration"], of_iteration)
    ]
    if not run.draw_ahead or settings[0] != settings[1]:
        ahead = {**ahead, "completions": None}
    return RolloutAhead.from_state_dict(ahead, run.prompts.prompts, rank=rank, world_size=world_size)


def check_settings(state: dict[str, Any], settings: dict[str, int]) -> None:
    """Refuse to go on in the middle of an iteration, or of an epoch, under settings that cut it otherwise.

    Raises:
        ConfigurationError: A setting differs that the rest of the iteration depends on.
    """
    for key, value in settings.items():
        if state["settings"][key] != value:
            raise ConfigurationError(
                f"{key}: the checkpoint was written with {state['settings'][key]}, and cannot be resumed with {value}. "
                "Start a new run from the exported policy instead."
            )


def _begin_validation_anew(fit_loop: dict[str, Any]) -> None:
    """A validation under way begins anew when the run goes on: what it has counted so far is not in the checkpoint."""
    progress = fit_loop["epoch_loop.val_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    num_done = current["completed"]
    if num_done and current["started"] == current["processed"] + 1:
        for stage in current:
            current[stage] -= num_done
            total[stage] -= num_done


def _check_iteration(saved: dict[str, str], current: dict[str, str]) -> None:
    """Refuse to learn from an experience whose columns were filled in for something else.

    Raises:
        ConfigurationError: Names the first key that differs.
    """
    for key in sorted({*saved, *current}):
        before, now = saved.get(key, "absent"), current.get(key, "absent")
        if before != now:
            raise ConfigurationError(
                f"{key}: the checkpoint was written in the middle of an iteration with {before}, got {now}. Change it "
                "from a checkpoint at an iteration's end, or in a new run from the exported policy."
            )


def _resumed(moved: dict[str, tuple[float, float]], configured: Coefficients) -> Coefficients:
    """What callbacks had made of the coefficients, but for those whose setting is another one now."""
    coefficients = configured
    for name, (before, value) in moved.items():
        now = getattr(configured, name)
        if before == now:
            coefficients = coefficients._replace(**{name: value})
        else:
            rank_zero_info(
                f"Resumed with model.objective.{name}.coefficient {now:g}; the run had moved it from {before:g} to "
                f"{value:g}."
            )
    return coefficients


def weights_of(checkpoint: dict[str, Any], *, with_reference: bool) -> dict[str, Any]:
    """The weights that a run takes from a checkpoint: those of a reference that has moved only if it has one."""
    weights: dict[str, Any] = checkpoint["state_dict"]
    return {name: value for name, value in weights.items() if with_reference or not name.startswith("reference.")}


def check_weights(saved: dict[str, Any], current: dict[str, torch.Size]) -> None:
    """Refuse the checkpoint of another model.

    Args:
        saved: The weights in the checkpoint.
        current: The shapes of the model's.

    Raises:
        ConfigurationError: A weight is missing, is new, or has another shape.
    """
    found = {name: weight.shape for name, weight in saved.items()}
    for name in sorted({*found, *current}):
        if found.get(name) != current.get(name):
            pair = (found.get(name), current.get(name))
            described = ["absent" if shape is None else f"of shape {tuple(shape)}" for shape in pair]
            raise ConfigurationError(
                f"--ckpt_path: the checkpoint is of another model than model.policy, or has another model.lora: {name} "
                f"is {described[0]} in the checkpoint and {described[1]} in the model."
            )


def check_base(state: dict[str, Any], base_checksum: int | None, *, is_adapter: bool) -> None:
    """Refuse to go on over other frozen weights: under an adapter, or those of the reference.

    Args:
        state: What `own_state` found. Of a run without a reference, or of an earlier version, it says nothing of one.
        base_checksum: Of this run's frozen weights; None where it has none.
        is_adapter: Whether they are under an adapter.

    Raises:
        ConfigurationError: The checkpoint's run had other ones, or ones of another precision.
    """
    saved = state.get("base_checksum")
    if is_adapter and saved != base_checksum:
        raise ConfigurationError(
            "--ckpt_path: the checkpoint holds an adapter that was trained on other weights than those of model.policy."
        )
    if not is_adapter and None not in (saved, base_checksum) and saved != base_checksum:
        raise ConfigurationError(
            "--ckpt_path: the run began with other weights than model.policy has now, or in another precision, and "
            "they are its reference (model.objective.kl).\nWas model.policy.path made anew? Put back what it held, or "
            "start a new run from the exported policy."
        )


def _gathered(state: dict[str, Any], merge: Merge) -> dict[str, Any] | None:
    """One state of those of all ranks, on the first one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return state
    is_first = torch.distributed.get_rank() == 0
    states: list[Any] | None = [None] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(state, states)
    return merge(states) if states is not None else None
