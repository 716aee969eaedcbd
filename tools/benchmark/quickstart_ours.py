"""The worker of this framework on the quickstart's task."""

import argparse
from functools import partial
from pathlib import Path

from grpo_lightning import GRPOModule
from grpo_lightning.objective import Clipped, GroupMean, GroupStd, Objective, TokenMean, TokenRatio
from grpo_lightning.policy import PretrainedPolicy
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.types import SamplingParams
from tools.benchmark import quickstart
from tools.benchmark.ours import make_trainer, serve
from tools.benchmark.protocol import Channel


def make_module(folder: Path, *, is_fused: bool = True) -> GRPOModule:
    """`configs/quickstart.yaml`, with every group in the loss, as in TRL.

    Args:
        folder: The policy of the cold start.
        is_fused: Whether the optimizer is; Lightning clips no gradients of a fused one in mixed precision.
    """
    return GRPOModule(
        policy=PretrainedPolicy(str(folder)),
        objective=Objective(
            advantage=GroupMean(),
            scale=GroupStd(ddof=1, epsilon=1e-4),
            ratio=TokenRatio(),
            surrogate=Clipped(clip_low=quickstart.CLIP_LOW, clip_high=quickstart.CLIP_HIGH),
            aggregation=TokenMean(),
        ),
        sampling=SamplingParams(max_new_tokens=quickstart.MAX_NEW_TOKENS),
        engine=InProcessEngine(max_rows=512),
        optimizer=partial(quickstart.make_optimizer, is_fused=is_fused),
        schedule=quickstart.SCHEDULE,
        prompts_per_iteration=quickstart.NUM_PROMPTS,
        group_size=quickstart.GROUP_SIZE,
    )


def main() -> None:
    """Serve until the coordinator has had enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("descriptor", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="32-true")
    settings = parser.parse_args()
    module = make_module(settings.folder, is_fused=settings.precision == "32-true")
    held_out = quickstart.HeldOut(module.tokenizer)
    answers = {"accuracy": lambda trained, _: held_out.accuracy(trained.policy.model)}
    channel = Channel(settings.descriptor)
    limits = {"max_steps": quickstart.MAX_STEPS, "precision": settings.precision}
    trainer = make_trainer(channel, held_out.reward, answers, **limits)
    serve(trainer, module, quickstart.data())


if __name__ == "__main__":
    main()
