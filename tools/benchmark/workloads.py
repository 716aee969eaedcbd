"""What is measured: models by their shape, and iterations by their lengths."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama with as many key-value heads as heads, and the input embedding as its head."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices of one layer: four of attention, three of the gated network."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate


@dataclass(frozen=True, kw_only=True)
class Goals:
    """Ratios of medians that are aimed at; None for no goal."""

    speedup: float | None = None
    """TRL's seconds per step over ours, at least."""
    memory: float | None = None
    """Our peak memory over TRL's, at most."""
    resident: float | None = None
    """Our peak memory over that of the process, weights, gradients, optimizer and reference, at most."""
    floor: float | None = None
    """Our seconds per step over the counted floor, at most."""
    rollout: float | None = None
    """Our rollout's tokens per second over those of transformers' `generate`, at least."""
    bf16: float | None = None
    """Our fp32 seconds per step over those with bf16 compute, at least."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step: a rollout, its rewards, and an update on all of it.

    Args:
        name: Short.
        model: Its shape; the weights are random.
        num_prompts: P, distinct.
        prompt_tokens: Of each prompt.
        group_size: G.
        max_new_tokens: Of each completion; exactly so many where not `is_ragged`.
        is_ragged: Completions end where the end of sequence is drawn, whose probability is 1/V or near it, so that
            lengths are geometric with mean V.
        goals: What is aimed at.
        kl_coefficient: beta; above 0 a reference model is asked as well.
    """

    name: str
    model: ModelShape
    num_prompts: int
    prompt_tokens: int
    group_size: int
    max_new_tokens: int
    is_ragged: bool = False
    goals: Goals = Goals()
    kl_coefficient: float = 0.04

    @property
    def num_completions(self) -> int:
        """B."""
        return self.num_prompts * self.group_size

    def reduced(self) -> "Workload":
        """The same with a tenth of the tokens, to try the benchmark itself."""
        return replace(
            self,
            num_prompts=2,
            prompt_tokens=max(self.prompt_tokens // 4, 4),
            group_size=4,
            max_new_tokens=max(self.max_new_tokens // 8, 8),
        )


_SMALL = ModelShape(vocabulary=64, hidden=256, intermediate=688, layers=4, heads=4)
_WIDE_HEAD = ModelShape(vocabulary=151_936, hidden=256, intermediate=688, layers=2, heads=4)
_MIDDLE = ModelShape(vocabulary=32_000, hidden=512, intermediate=1368, layers=8, heads=8)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="W1",
            model=_SMALL,
            num_prompts=8,
            prompt_tokens=16,
            group_size=8,
            max_new_tokens=128,
            goals=Goals(speedup=1.2, floor=1.5, rollout=1.1),
        ),
        Workload(
            name="W2",
            model=_SMALL,
            num_prompts=4,
            prompt_tokens=512,
            group_size=16,
            max_new_tokens=64,
            goals=Goals(speedup=4.0, floor=1.5, rollout=6.0, bf16=1.5),
        ),
        Workload(
            name="W3",
            model=_SMALL,
            num_prompts=8,
            prompt_tokens=16,
            group_size=8,
            max_new_tokens=384,
            is_ragged=True,
            goals=Goals(speedup=4.0, rollout=2.5),
        ),
        Workload(
            name="W4",
            model=_WIDE_HEAD,
            num_prompts=8,
            prompt_tokens=16,
            group_size=8,
            max_new_tokens=64,
            goals=Goals(speedup=3.0, memory=0.35, resident=1.3, floor=1.5, bf16=1.5),
        ),
        Workload(
            name="W5",
            model=_MIDDLE,
            num_prompts=4,
            prompt_tokens=256,
            group_size=8,
            max_new_tokens=128,
            goals=Goals(speedup=2.5, memory=0.4, floor=1.5, bf16=1.5),
        ),
    )
}


def for_ranks(workload: Workload, num_ranks: int) -> Workload:
    """The same work for each of some ranks: so many times the prompts."""
    return replace(workload, num_prompts=num_ranks * workload.num_prompts)
