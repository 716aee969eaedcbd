"""Observer: where an iteration's time goes, and what the machine made of it."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grpo_lightning.accounting import Group, ModelSize, decode_bytes, update_flops
from grpo_lightning.types import ConfigurationError, Rollout

if TYPE_CHECKING:
    from grpo_lightning.batching import Experience
    from grpo_lightning.batching.experience import Sample
    from grpo_lightning.module import GRPOModule

_GIB = 2**30


class Throughput(Callback):
    """Logs, at each iteration's end, the seconds of its phases and what was done in them.

    ``time/iteration``, and of it ``time/generate``, ``time/score``, ``time/prepare`` and ``time/update`` (the rest:
    forward, backward, optimizer). Validation is no part of an iteration. With `model.draw_ahead`, ``time/generate`` is
    what is waited for, and ``time/generate_hidden`` for how long completions were drawn beside the rest. Under
    ``throughput/``:

    * ``generated_tokens_per_second`` of both, ``trained_tokens_per_second`` of the update;
    * ``padding_ratio``: the share of the tokens in the update's forwards that are no distinct token of a completion or
      of its group's prompt, so padding and repeated prompts; ``recomputed_ratio``: the share that was computed again in
      the backward pass;
    * ``update_mfu``: operations that the update needs, see `accounting`, over what the processors can do in its time;
    * ``decode_mbu``: bytes that decoding needs to read over what memory can deliver in both;
    * ``peak_memory_gib``: of the process so far on a CPU, of torch's allocator elsewhere; the largest of all ranks.

    Tokens and operations are added up over ranks, seconds are those of this process. A module that makes no rollouts,
    and the first part of an iteration before a resume, are left out.

    Args:
        peak_flops: Operations per second that one rank's processor can do; None to measure it at the run's beginning,
            as a product of matrices of 1024 x 1024 in the policy's precision.
        peak_bandwidth: Bytes per second that one rank's memory delivers; None to measure it by summing 128 MiB.

    Raises:
        ConfigurationError: A peak is not positive.
    """

    def __init__(self, peak_flops: float | None = None, peak_bandwidth: float | None = None) -> None:
        for name, peak in (("peak_flops", peak_flops), ("peak_bandwidth", peak_bandwidth)):
            if peak is not None and peak <= 0:
                raise ConfigurationError(f"Throughput.{name} must be > 0 or null, got {peak}.")
        self._given = peak_flops, peak_bandwidth
        self._size: ModelSize | None = None
        self._tokens_computed = _TokenCounter()
        self._start: float | None = None
        self._seconds = 0.0
        self._before: dict[str, float] = {}
        self._learned: list[Group] = []
        self._values: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002
        """Settle the peaks, and count the tokens that go through the policy from here on."""
        self._start, self._before, self._values = None, {}, {}
        if not hasattr(pl_module, "seconds_by_phase"):
            return
        assert pl_module.policy is not None
        model = pl_module.policy.model
        self._size = ModelSize.of(model)
        parameter = next(model.parameters())
        flops, bandwidth = self._given
        self._peaks = flops or measured_flops(parameter), bandwidth or measured_bandwidth(parameter.device)
        self._tokens_computed.attach(model.get_input_embeddings())

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Start the clock of an iteration, or go on with it."""
        if getattr(batch, "starts_iteration", False):
            self._seconds, self._before = 0.0, self._stock(pl_module)
            self._tokens_computed.reset()
        self._start = time.perf_counter()

    def on_phase(self, trainer: Trainer, pl_module: Any, phase: str | None) -> None:  # noqa: ARG002
        """Tell apart which forwards are counted, and look at what is learned from while it is there."""
        self._tokens_computed.phase = phase
        if phase == "update" and pl_module.experience is not None:
            self._learned = learned_groups(pl_module.experience)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log what an iteration took, when it is over."""
        if self._start is None or not self._before:
            return
        is_over = batch.ends_iteration
        if is_over and pl_module.device.type != "cpu":
            torch.accelerator.synchronize()
        self._seconds += time.perf_counter() - self._start
        if not is_over:
            return
        metrics = self._metrics(trainer, pl_module)
        self._before = {}
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)
        pl_module.log_dict(metrics, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002
        """Count no more."""
        self._tokens_computed.detach()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Count no more."""
        self._tokens_computed.detach()

    def summary(self) -> dict[str, float | bool]:
        """The mean of each metric over the iterations, the largest memory, and the peaks with where they come from."""
        if not self._values:
            return {}
        flops, bandwidth = self._peaks
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        memory = "throughput/peak_memory_gib"
        return {
            **means,
            memory: max(self._values[memory]),
            "peak_flops": flops,
            "peak_flops_measured": self._given[0] is None,
            "peak_bandwidth": bandwidth,
            "peak_bandwidth_measured": self._given[1] is None,
        }

    def _stock(self, module: "GRPOModule") -> dict[str, float]:
        """The run's counters that only ever grow."""
        tokens = {"generated": float(module.tokens_generated), "trained": float(module.tokens_trained)}
        return {**tokens, "hidden": module.hidden_seconds, **module.seconds_by_phase}

    def _metrics(self, trainer: Trainer, module: "GRPOModule") -> dict[str, float]:
        now = self._stock(module)
        spent = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        seconds = {name: spent.get(name, 0.0) for name in ("generate", "score", "prepare")}
        seconds["update"] = self._seconds - sum(seconds.values())
        generating = seconds["generate"] + spent["hidden"]
        assert module.rollout is not None
        distinct, computed, again, flops, read = self._reduced(
            trainer, module, self._work(module, module.rollout), "sum"
        )
        (memory,) = self._reduced(trainer, module, [peak_memory(module.device)], "max")
        found = {
            "generated_tokens_per_second": spent["generated"] / generating,
            "trained_tokens_per_second": spent["trained"] / seconds["update"],
            # The flat layouts leave out each last token, which predicts nothing.
            "padding_ratio": max(0.0, 1 - distinct / computed) if computed else 0.0,
            "recomputed_ratio": again / (computed + again) if computed else 0.0,
            "peak_memory_gib": memory / _GIB,
        }
        if self._size is not None:
            found["update_mfu"] = flops / (trainer.world_size * self._peaks[0] * seconds["update"])
            found["decode_mbu"] = read / (trainer.world_size * self._peaks[1] * generating)
        times = {"time/iteration": self._seconds, **{f"time/{name}": value for name, value in seconds.items()}}
        if module.draw_ahead:
            times["time/generate_hidden"] = spent["hidden"]
        return {**times, **{f"throughput/{name}": value for name, value in found.items()}}

    def _work(self, module: "GRPOModule", rollout: Rollout) -> list[float]:
        """Of this rank: distinct tokens, tokens computed, and again; operations needed, bytes needed."""
        num_epochs, groups = module.shape.num_epochs, self._learned
        distinct = num_epochs * sum(group.num_tokens for group in groups)
        needed = [0, 0]
        if self._size is not None:
            needed = [num_epochs * update_flops(self._size, groups), decode_bytes(self._size, groups_of(rollout))]
        again = self._tokens_computed.again
        if module.gradient_checkpointing:
            again += self._tokens_computed.first  # layer by layer, which the input embedding is not asked for
        return [distinct, self._tokens_computed.first, again, *needed]

    @staticmethod
    def _reduced(trainer: Trainer, module: "GRPOModule", values: list[float], how: str) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=module.device)
        reduced: Tensor = trainer.strategy.reduce(tensor, reduce_op=how)
        return [float(value) for value in reduced.tolist()]


class _TokenCounter:
    """Counts the tokens of forwards in the update, and of those that the backward pass makes, which is in no phase."""

    def __init__(self) -> None:
        self.phase: str | None = None
        self._handle: RemovableHandle | None = None
        self.reset()

    def reset(self) -> None:
        """Begin at 0."""
        self.first = self.again = 0

    def attach(self, embedding: nn.Module) -> None:
        """Count what the input embedding is asked for, which every layout of a forward goes through."""
        self.detach()
        self._handle = embedding.register_forward_hook(self._count)

    def detach(self) -> None:
        """Count no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG002
        if self.phase == "update":
            self.first += inputs[0].numel()
        elif self.phase is None:
            self.again += inputs[0].numel()


def groups_of(rollout: Rollout) -> list[Group]:
    """The lengths of a rollout's groups."""
    lengths = [len(completion.token_ids) for completion in rollout.completions]
    size = rollout.group_size
    return [
        Group(prompt=len(prompt.token_ids), completions=tuple(lengths[i * size : (i + 1) * size]))
        for i, prompt in enumerate(rollout.prompts)
    ]


def learned_groups(experience: "Experience") -> list[Group]:
    """The lengths of what is learned from, by group."""
    by_slot: dict[int, list[Sample]] = {}
    for sample in (sample for minibatch in experience.minibatches for sample in minibatch):
        by_slot.setdefault(sample.slot, []).append(sample)
    return [
        Group(prompt=len(samples[0].prompt_ids), completions=tuple(len(sample.completion_ids) for sample in samples))
        for samples in by_slot.values()
    ]


@torch.no_grad()
def measured_flops(like: Tensor, *, width: int = 1024, repetitions: int = 5) -> float:
    """Operations per second of square matrix products in the precision of a tensor, on its device: the best of some."""
    matrix = torch.ones(width, width, dtype=like.dtype, device=like.device)
    return 2 * width**3 / _least_seconds(lambda: matrix @ matrix, repetitions, like.device)


@torch.no_grad()
def measured_bandwidth(device: torch.device, *, num_bytes: int = 2**27, repetitions: int = 3) -> float:
    """Bytes per second that a sum reads: the best of some."""
    values = torch.ones(num_bytes // 4, device=device)
    return num_bytes / _least_seconds(values.sum, repetitions, device)


def _least_seconds(run: Any, repetitions: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_memory(device: torch.device) -> float:
    """The largest number of bytes so far: resident on a CPU, allocated by torch elsewhere."""
    if device.type != "cpu":
        return float(torch.accelerator.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, in KiB elsewhere
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def summary_of(trainer: Trainer) -> Mapping[str, float | bool]:
    """What a run's `Throughput` found; nothing where it has none."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.summary() for callback in callbacks if isinstance(callback, Throughput)), {})
