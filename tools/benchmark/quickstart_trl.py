"""The worker of TRL on the quickstart's task."""

import argparse
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lightning.types import Completion, FinishReason, Prompt
from tools.benchmark import memory, quickstart
from tools.benchmark.protocol import Channel
from tools.benchmark.trl_worker import quiet_settings, serve


def make_trainer(folder: Path) -> trl.GRPOTrainer:
    """The quickstart's settings in TRL's words, with its very optimizer and schedule."""
    config = trl.GRPOConfig(
        **quiet_settings(folder / "trl"),
        per_device_train_batch_size=quickstart.NUM_PROMPTS * quickstart.GROUP_SIZE,
        num_generations=quickstart.GROUP_SIZE,
        max_completion_length=quickstart.MAX_NEW_TOKENS,
        beta=0.0,
        loss_type="dapo",
        epsilon=quickstart.CLIP_LOW,
        epsilon_high=quickstart.CLIP_HIGH,
        max_steps=quickstart.MAX_STEPS,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = quickstart.make_optimizer(model.parameters())
    rows = quickstart.data().rows("train")
    return trl.GRPOTrainer(
        model=model,
        optimizers=(optimizer, quickstart.SCHEDULE.scheduler(optimizer, quickstart.MAX_STEPS)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=_rewards,
        args=config,
        train_dataset=Dataset.from_dict({key: [row[key] for row in rows] for key in ("prompt", "answer")}),
    )


def _rewards(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    reward = quickstart.ExactAnswer(marker="#")
    asked = [
        Prompt(index=i, token_ids=(), text=text, columns={"answer": expected})
        for i, (text, expected) in enumerate(zip(prompts, answer, strict=True))
    ]
    given = [
        Completion(token_ids=(), sampler_logprobs=(), text=text, finish_reason=FinishReason.EOS) for text in completions
    ]
    return reward.score(asked, given)


def main() -> None:
    """Serve until the coordinator has had enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("descriptor", type=int)
    parser.add_argument("folder", type=Path)
    settings = parser.parse_args()
    channel = Channel(settings.descriptor)
    base_bytes = memory.current()
    trainer = make_trainer(settings.folder)
    held_out = quickstart.HeldOut(trainer.processing_class)
    channel.handlers["accuracy"] = lambda _: held_out.accuracy(trainer.model)
    serve(trainer, channel, quickstart.MAX_NEW_TOKENS, base_bytes=base_bytes)


if __name__ == "__main__":
    main()
