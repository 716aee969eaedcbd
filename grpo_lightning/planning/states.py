"""Bytes of weights, gradients, optimizer states and reference on each rank, by strategy."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

BUCKET = 200_000_000
"""Elements of each of the two buffers that ZeRO reduces gradients in, as Lightning sets it."""
MAX_LIVE = 1_000_000_000
"""Elements of weights that ZeRO's stage 3 keeps whole at once (`stage3_max_live_parameters`)."""


class Size(NamedTuple):
    """Of a tensor."""

    numel: int
    itemsize: int


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A policy's tensors.

    Args:
        trained: Those with a gradient.
        frozen: The others.
        block: Elements of the largest transformer block.
        around: Elements of what is around the blocks: embeddings, last norm, head.
    """

    trained: tuple[Size, ...]
    frozen: tuple[Size, ...] = ()
    block: int = 0
    around: int = 0

    def in_precision(self, itemsize: int | None) -> "Weights":
        """With tensors of another precision; None changes nothing."""
        if itemsize is None:
            return self
        trained, frozen = (tuple(Size(n, itemsize) for n, _ in sizes) for sizes in (self.trained, self.frozen))
        return Weights(trained=trained, frozen=frozen, block=self.block, around=self.around)


class OptimizerStates(NamedTuple):
    """What an optimizer keeps of a weight after its first step."""

    per_element: int
    """Numbers in the weight's precision for each of its elements: 2 for AdamW."""
    per_tensor: int
    """Bytes for each weight: AdamW's count of steps has 4."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Where a strategy has the tensors.

    Args:
        name: One of single, ddp, fsdp2, deepspeed_1, deepspeed_2, deepspeed_3.
        ranks: n, over all machines.
        offload: Of deepspeed: whether shards lie in the CPU's memory.
        compute_itemsize: Bytes of a weight in forward and backward; None for its own precision.
        is_layerwise: Whether a rollout puts weights together layer by layer.
    """

    name: str
    ranks: int
    offload: bool = False
    compute_itemsize: int | None = None
    is_layerwise: bool = False


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one rank, all on the device but `on_cpu`."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    buckets: int = 0
    """In which gradients are exchanged."""
    gathered_in_rollout: int = 0
    """Whole weights during a rollout, beside the shards."""
    gathered_in_update: int = 0
    """What of them is whole at once during an update."""
    on_cpu: int = 0

    def __post_init__(self) -> None:
        assert all(getattr(self, field.name) >= 0 for field in fields(self))


def states_of(weights: Weights, sharding: Sharding, optimizer: OptimizerStates, *, has_reference: bool) -> States:
    r"""What a rank holds.

    With P trained and F frozen elements of s bytes, n ranks, m numbers per element of the optimizer, and c bytes of a
    weight in computation (every tensor's share is rounded up to whole elements):

    ============  ===========  ==================  =====================  ==============  =========================
    strategy      weights      gradients           optimizer              buckets         gathered: rollout; update
    ============  ===========  ==================  =====================  ==============  =========================
    single        s(P+F)       sP                  msP                    0               0; 0
    ddp           s(P+F)       sP                  msP                    sP              0; 0
    fsdp2         s(P+F)/n     sP/n                msP/n                  0               c(P+F); see below
    deepspeed_1   c(P+F)       cP + 4P/n           4(1+m)P/n              2c BUCKET       0; 0
    deepspeed_2   c(P+F)       cP/n + 4P/n         4(1+m)P/n              2c BUCKET       0; 0
    deepspeed_3   c(P+F)/n     cP/n + 4P/n         4(1+m)P/n              2c BUCKET       c(P+F); c min(P+F, MAX_LIVE)
    ============  ===========  ==================  =====================  ==============  =========================

    A reference, which has no gradient, is as large as the weights. fsdp2 has whole in an update what is around the
    blocks (e elements), two blocks (of b) and the gradients of one: :math:`c(2e + 3b)`. A rollout that puts weights
    together layer by layer has in the place of :math:`c(P + F)` a block, and the buffer that it comes in:
    :math:`c(e + 2b)`. ZeRO steps masters in fp32, in shards, from a copy of the gradients in fp32. With offload, the
    optimizer and the shards of gradients are in the CPU's memory; with stage 3 weights and reference too.

    Args:
        weights: Of the policy.
        sharding: Of the strategy.
        optimizer: Of the optimizer.
        has_reference: Whether a reference has a copy of the weights.
    """
    if sharding.name.startswith("deepspeed"):
        return _zero(weights, sharding, optimizer, has_reference)
    n = sharding.ranks if sharding.name == "fsdp2" else 1
    of_weights = _shards((*weights.trained, *weights.frozen), n)
    gradients = _shards(weights.trained, n)
    whole = in_update = 0
    if sharding.name == "fsdp2":
        computed = weights.in_precision(sharding.compute_itemsize)
        itemsize = max((size.itemsize for size in computed.trained or computed.frozen), default=0)
        whole = _shards((*computed.trained, *computed.frozen), 1)
        if sharding.is_layerwise:
            whole = itemsize * (weights.around + 2 * weights.block)
        in_update = itemsize * (2 * weights.around + 3 * weights.block)
    return States(
        weights=of_weights,
        gradients=gradients,
        optimizer=optimizer.per_element * gradients + optimizer.per_tensor * len(weights.trained),
        reference=of_weights * has_reference,
        buckets=gradients if sharding.name == "ddp" else 0,
        gathered_in_rollout=whole,
        gathered_in_update=in_update,
    )


def _zero(weights: Weights, sharding: Sharding, optimizer: OptimizerStates, has_reference: bool) -> States:
    stage, n, c = int(sharding.name[-1]), sharding.ranks, sharding.compute_itemsize or 4
    computed = weights.in_precision(c)
    every = (*computed.trained, *computed.frozen)
    of_weights = _shards(every, n if stage == 3 else 1)
    masters = _shards(weights.in_precision(4).trained, n)
    kept = _shards(computed.trained, 1 if stage == 1 else n)
    stepped = (1 + optimizer.per_element) * masters + optimizer.per_tensor
    reference = of_weights * has_reference
    is_off, weights_are_off = sharding.offload, sharding.offload and stage == 3
    on_cpu = is_off * (stepped + masters) + (is_off and stage > 1) * kept + weights_are_off * (of_weights + reference)
    elements = sum(size.numel for size in every)
    in_rollout = weights.around + 2 * weights.block if sharding.is_layerwise else elements
    return States(
        weights=0 if weights_are_off else of_weights,
        gradients=(0 if is_off and stage > 1 else kept) + (0 if is_off else masters),
        optimizer=0 if is_off else stepped,
        reference=0 if weights_are_off else reference,
        buckets=2 * c * BUCKET,
        gathered_in_rollout=c * in_rollout if stage == 3 else 0,
        gathered_in_update=c * min(elements, MAX_LIVE) if stage == 3 else 0,
        on_cpu=on_cpu,
    )


def _shards(sizes: Iterable[Size], n: int) -> int:
    """Bytes of each tensor's share, rounded up to whole elements."""
    return sum(-(-size.numel // n) * size.itemsize for size in sizes)
