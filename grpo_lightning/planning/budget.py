"""A run's memory, line by line, at its two peaks: the rollout and the update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grpo_lightning.batching import IterationShape, Layout, Padded
from grpo_lightning.batching.layout import Row
from grpo_lightning.planning.activations import Decoder, Precision, Tokens, activation_bytes
from grpo_lightning.planning.cache import CacheBytes, cache_bytes
from grpo_lightning.planning.settings import (
    Settings,
    is_autocast,
    layout_of,
    lora_of,
    optimizer_states,
    policy_source,
    sharding_of,
    trainer_itemsize,
)
from grpo_lightning.planning.states import Size, States, Weights, states_of
from grpo_lightning.policy.adaptation import adapted_layers
from grpo_lightning.preconditions import check_division
from grpo_lightning.strategies.fsdp2 import blocks_of
from grpo_lightning.types import ConfigurationError

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank.

    Args:
        headline: What was planned, in words.
        lines: What takes memory on the device, each in the rollout and in the update.
        on_cpu: What lies in the CPU's memory.
    """

    headline: str
    lines: dict[str, tuple[int, int]]
    on_cpu: int = 0

    @property
    def rollout(self) -> int:
        """The peak of the rollout."""
        return sum(rollout for rollout, _ in self.lines.values())

    @property
    def update(self) -> int:
        """The peak of the update."""
        return sum(update for _, update in self.lines.values())


def budget_of(settings: Settings, *, ranks: int, prompt_tokens: int | None = None) -> Budget:
    """What a run needs, if every prompt and every completion has its longest length.

    Args:
        settings: Of the run.
        ranks: Over all machines.
        prompt_tokens: Of the longest prompt; None for `data.max_prompt_tokens`.

    Raises:
        ConfigurationError: A setting that is needed is missing.
    """
    sharding = sharding_of(settings, ranks)
    converted = trainer_itemsize(settings, sharding.name)
    model, lora = policy_source(settings).load_skeleton(), lora_of(settings)
    if lora is not None:
        lora.adapt_skeleton(model)
    weights = weights_of(model).in_precision(converted)
    coefficient = settings.get("model.objective.kl.coefficient", 0)
    has_reference = lora is None and settings.get("model.objective.kl") is not None and coefficient != 0
    states = states_of(weights, sharding, optimizer_states(settings), has_reference=has_reference)
    autocast = is_autocast(settings, sharding.name)
    itemsize = 2 if autocast else sharding.compute_itemsize or converted or model.dtype.itemsize
    precision = Precision(itemsize, autocast)
    decoder = decoder_of(model, itemsize)
    demand = _Demand(settings, ranks, prompt_tokens)
    tokens = demand.microbatch(layout_of(settings))
    checkpointing = bool(settings.get("model.gradient_checkpointing", False))
    activations = activation_bytes(decoder, precision, tokens, checkpointing=checkpointing)
    copies = itemsize * sum(size.numel for size in (*weights.trained, *weights.frozen)) if autocast else 0
    cache = demand.cache(2 * decoder.layers * decoder.keys * itemsize)
    elements = sum(size.numel for size in (*weights.trained, *weights.frozen))
    engine_copy = elements * itemsize if demand.engine == "VLLMEngine" else 0
    words = f"{elements:,} weights, {sharding.name}, {ranks} rank{'s' * (ranks > 1)}"
    lengths = f"{demand.prompt_tokens} + {demand.new_tokens} tokens, {tokens.computed:,} in the largest forward"
    return Budget(
        headline=f"{words}; {lengths}",
        lines={
            **_state_lines(states, keeps_gradients=not sharding.name.startswith("deepspeed")),
            "weights cast by autocast": (copies, copies),
            "copy of the weights in the engine": (engine_copy, engine_copy),
            "keys and values": (cache.held, cache.held if engine_copy else 0),
            "keys and values, while they grow": (cache.growing, 0),
            "logits of the rollout": (demand.rows * decoder.vocabulary * 8, 0),
            "activations": (0, activations),
        },
        on_cpu=states.on_cpu,
    )


def _state_lines(states: States, *, keeps_gradients: bool) -> dict[str, tuple[int, int]]:
    """Those of an update are freed by the next one's backward, or by DeepSpeed at once."""
    return {
        "weights": (states.weights, states.weights),
        "gradients": (states.gradients * keeps_gradients, states.gradients),
        "optimizer": (states.optimizer, states.optimizer),
        "reference": (states.reference, states.reference),
        "buckets of gradients": (states.buckets, states.buckets),
        "weights gathered": (states.gathered_in_rollout, states.gathered_in_update),
    }


def weights_of(model: nn.Module) -> Weights:
    """A model's tensors, of which tied ones count once."""
    sizes: dict[bool, list[Size]] = {True: [], False: []}
    for parameter in model.parameters():
        sizes[parameter.requires_grad].append(Size(parameter.numel(), parameter.element_size()))
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    around = sum(size.numel for group in sizes.values() for size in group) - sum(in_blocks)
    return Weights(
        trained=tuple(sizes[True]), frozen=tuple(sizes[False]), block=max(in_blocks, default=0), around=around
    )


def decoder_of(model: PreTrainedModel, itemsize: int) -> Decoder:
    """The sizes that the config names; low-rank additions keep r numbers, and an input that is cast to fp32."""
    config: Any = model.config.get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    adapted = adapted_layers(model).values()
    cast = 4 if itemsize < 4 else 0
    additions = sum(4 * a.out_features + cast * a.in_features for layer in adapted for a in layer.lora_A.values())
    return Decoder(
        layers=layers,
        hidden=config.hidden_size,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        feed_forward=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        additions=-(-additions // layers),
    )


class _Demand:
    """What a rank draws and learns from, if every prompt and completion is as long as can be."""

    def __init__(self, settings: Settings, ranks: int, prompt_tokens: int | None) -> None:
        self.settings = settings
        longest = prompt_tokens or settings.optional_count("data.max_prompt_tokens")
        if longest is None:
            raise ConfigurationError(
                "plan: give --prompt_tokens, of the longest prompt: data.max_prompt_tokens is not."
            )
        self.prompt_tokens = longest
        self.new_tokens = settings.count("model.sampling.max_new_tokens")
        self.group_size = settings.count("model.group_size")
        self.num_minibatches = settings.count("model.num_minibatches", 1)
        self.num_microbatches = settings.count("trainer.accumulate_grad_batches", 1)
        prompts = settings.count("model.prompts_per_iteration")
        shape = IterationShape(
            prompts_per_iteration=prompts,
            group_size=self.group_size,
            num_epochs=1,
            num_minibatches=self.num_minibatches,
        )
        check_division(shape, num_ranks=ranks, num_microbatches=self.num_microbatches)
        self.prompts = prompts // ranks
        self.engine = str(settings.get("model.engine.class_path", "InProcessEngine")).rsplit(".", 1)[-1]

    @property
    def rows(self) -> int:
        """Completions that are decoded at once in the training process."""
        every = self.prompts * self.group_size
        if self.engine != "InProcessEngine":
            return 0
        key = "model.engine.max_rows"
        limit = self.settings.optional_count(key) if self.settings.has(key) else 256
        return min(limit or every, every)

    def cache(self, token: int) -> CacheBytes:
        """Of the engine in the training process."""
        if self.engine == "VLLMEngine":
            return CacheBytes(int(self._engine("kv_cache_gib", 1.0) * GIB), 0)
        if self.engine != "InProcessEngine":
            return CacheBytes(0, 0)
        least, saved = self._engine("share_prompts_from", 16), self.prompt_tokens * (1 - 1 / self.group_size)
        return cache_bytes(
            prompts=self.prompts,
            group_size=self.group_size,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            max_rows=self.rows,
            shares=least is not None and saved >= least,
            token=token,
        )

    def microbatch(self, layout: Layout) -> Tokens:
        """The largest forward that is computed at once, as the layout cuts it."""
        prompts = self.prompts // self.num_minibatches
        ids = torch.empty(self.prompt_tokens, dtype=torch.long), torch.empty(self.new_tokens, dtype=torch.long)
        rows = [Row(slot, *ids) for slot in range(prompts) for _ in range(self.group_size)]
        forwards = []
        for numbers in layout.bins(rows, self.num_microbatches):
            of_bin = [rows[i] for i in numbers]
            pieces = layout.pieces(of_bin, self.settings.optional_count("model.max_tokens_per_microbatch"))
            forwards += [self._tokens([of_bin[i] for i in piece], layout) for piece in pieces]
        return max(forwards)

    def _tokens(self, rows: Sequence[Row], layout: Layout) -> Tokens:
        predicting = len(rows) * self.new_tokens
        if isinstance(layout, Padded):
            return Tokens(len(rows) * (self.prompt_tokens + self.new_tokens), predicting, 0)
        # A prompt with one completion alone, or packed with it, makes a plain sequence.
        sizes = [sum(row.slot == slot for row in rows) for slot in {row.slot for row in rows}]
        is_shared = type(layout).__name__ == "SharedPrefix"
        prompts = len(sizes) if is_shared else len(rows)
        sharing = sum(size for size in sizes if size > 1) if is_shared else 0
        computed = prompts * self.prompt_tokens + len(rows) * (self.new_tokens - 1)
        return Tokens(computed, predicting, sharing * (self.prompt_tokens + self.new_tokens - 1))

    def _engine(self, name: str, default: Any) -> Any:
        key = f"model.engine.{name}"
        return self.settings.get(key) if self.settings.has(key) else default
