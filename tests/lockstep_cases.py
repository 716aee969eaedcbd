"""A run whose rollouts gather weights layer by layer, and at its end rollouts of every kind, gathered so and whole."""

import os
from dataclasses import dataclass, replace

import replay
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.strategies.fsdp2 import blocks_of
from grpo_lightning.types import Coordinates, GenerationRequest, SamplingParams, Stream

WHERE = Coordinates(seed=5, stream=Stream.TEST, iteration=3)
RAGGED = SamplingParams(max_new_tokens=24)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What each of two ranks asks for: prompts of some lengths, with so many completions each."""

    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    num_completions: int = 3
    sampling: tuple[SamplingParams, SamplingParams] = (RAGGED, RAGGED)
    engine: dict[str, int | None]

    def requests(self, rank):
        return [
            GenerationRequest(
                slot=2 * i + rank,
                token_ids=tuple(3 + (i + 5 * t) % 12 for t in range(length)),
                num_completions=self.num_completions,
            )
            for i, length in enumerate(self.lengths[rank])
        ]


ALONE, SHARED = {"share_prompts_from": None}, {"share_prompts_from": 0}
LONG = SamplingParams(max_new_tokens=70, min_new_tokens=66)
CASES = {
    "different numbers": Case(lengths=((1, 4, 9, 9), (5,)), engine=ALONE),
    "one is done at once": Case(
        lengths=((2, 7), (2, 7)), sampling=(RAGGED, replace(RAGGED, max_new_tokens=1)), engine=ALONE
    ),
    "one has none": Case(lengths=((2, 7), ()), engine=ALONE),
    "few rows at once": Case(lengths=((3, 4, 8), (3, 4)), engine={**ALONE, "max_rows": 2}),
    "the cache grows": Case(lengths=((3, 8), (3,)), sampling=(LONG, RAGGED), engine=ALONE),
    "prompts are shared": Case(lengths=((6, 9), (2, 8, 8)), engine=SHARED),
    "shared by one": Case(lengths=((12, 12), (2,)), engine={"share_prompts_from": 5}),
}


class LongPolicy(replay.TinyPolicy):
    """With more positions than the cache begins with, and four blocks."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.config |= {"num_hidden_layers": 4, "max_position_embeddings": 160}


class OneHeldOut(replay.Sums):
    """The second rank has none to evaluate."""

    def rows(self, split):
        return super().rows(split)[: 1 if split == "validation" else None]


class DrawAll(Callback):
    """At the end of a run: what this rank draws in every case, and the most elements of weights that it has whole.

    A file says how far it has come: a machine may be slow.
    """

    def __init__(self, file):
        self.file, self.drawn, self.most_whole = file, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.file.write_text(f"trained: {batch}")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.file.write_text(f"validated: {batch_idx}")

    def on_train_end(self, trainer, pl_module):
        policy = pl_module.policy
        hooks = [
            module.register_forward_pre_hook(lambda *_: self._note(policy))
            for module in policy.modules()
            if not [*module.children()]
        ]
        for gather in ("whole", "layerwise"):
            self._gather, self.most_whole[gather] = gather, 0
            self.drawn[gather] = {name: self._draw(pl_module, case) for name, case in CASES.items()}
        for hook in hooks:
            hook.remove()
        in_blocks = [sum(self._sizes(block)) for block in blocks_of(policy)]
        self.sizes = {"whole": sum(self._sizes(policy)), "block": in_blocks[0]}
        self.sizes["around"] = self.sizes["whole"] - sum(in_blocks)

    def _draw(self, module, case):
        rank = module.global_rank
        module.engine = InProcessEngine(gather=self._gather, **case.engine)
        module.engine.setup(module.policy.model, module.tokenizer, module.policy.eos_token_ids)
        with module.drawable_policy():
            completions = module.engine.generate(case.requests(rank), case.sampling[rank], WHERE)
        self.file.write_text(f"{self._gather}: {case}")
        return [(c.token_ids, c.sampler_logprobs) for c in completions]

    def _note(self, policy):
        whole = sum(0 if isinstance(weight, DTensor) else weight.numel() for weight in policy.parameters())
        self.most_whole[self._gather] = max(self.most_whole[self._gather], whole)

    @staticmethod
    def _sizes(module):
        return [getattr(weight, "ds_numel", weight.numel()) for weight in module.parameters()]


def run(callbacks=(), **settings):
    """Like `replay.run`, with another policy and other held-out prompts."""
    module, _, trainer, record = replay.make(**settings, callbacks=callbacks)
    module.source = LongPolicy(getattr(torch, settings.get("dtype", "float32")))
    trainer.fit(module, OneHeldOut())
    return record, module


def in_world(folder, runs):
    """One rank's part in each run."""
    rank = os.environ["LOCAL_RANK"]
    (folder / f"ready.{rank}").touch()
    for i, settings in enumerate(runs):
        draw_all = DrawAll(folder / f"done.{rank}")
        record, _ = run(callbacks=[draw_all], ranks=2, **settings)
        names = {record: ("gradients", "weights", "metrics"), draw_all: ("drawn", "most_whole", "sizes")}
        told = {name: getattr(of, name) for of, names_of in names.items() for name in names_of}
        torch.save(told, folder / f"run.{i}.{rank}")
