"""The worker of TRL: its `GRPOTrainer` with the same weights, prompts, lengths and settings."""

import argparse
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from tools.benchmark import memory
from tools.benchmark.forced_lengths import Generation
from tools.benchmark.model_folder import prompt_texts, reward_of
from tools.benchmark.protocol import Channel, FinishedError, Hello, Report
from tools.benchmark.workloads import WORKLOADS, Workload


class Gate(TrainerCallback):
    """Holds the training loop before each step until the coordinator wants it, and reports what it cost."""

    def __init__(self, channel: Channel, generation: Generation) -> None:
        self.channel, self.generation = channel, generation
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Wait."""
        self.generation.forced = self.channel.wait_for_step()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Report."""
        seconds = time.perf_counter() - self.started
        self.channel.say(Report(seconds=seconds, peak_bytes=memory.peak(), lengths=self.generation.lengths))


def quiet_settings(output: Path) -> dict[str, Any]:
    """What every trainer of the benchmark has: fp32 on the CPU, one batch per step, nothing logged or saved."""
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def serve(trainer: trl.GRPOTrainer, channel: Channel, max_length: int, *, base_bytes: int) -> None:
    """Train until the coordinator has had enough.

    Args:
        trainer: Ready to train.
        channel: To the coordinator.
        max_length: Of a completion.
        base_bytes: The memory of the process before the trainer was made.
    """
    generation = Generation(trainer.model, max_length, trainer.processing_class.eos_token_id)
    channel.handlers["rollout"] = partial(_rollout, trainer, generation)
    trainer.add_callback(Gate(channel, generation))
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    channel.say(Hello(framework=f"TRL {trl.__version__}", base_bytes=base_bytes, num_parameters=num_parameters))
    with suppress(FinishedError):
        trainer.train()


def make_trainer(workload: Workload, folder: Path, output: Path) -> trl.GRPOTrainer:
    """The workload as a trainer: all its completions are one batch, as TRL does best on a CPU."""
    config = trl.GRPOConfig(
        **quiet_settings(output),
        per_device_train_batch_size=workload.num_completions,
        num_generations=workload.group_size,
        max_completion_length=workload.max_new_tokens,
        beta=workload.kl_coefficient,
        use_bias_correction_kl=False,
        loss_type="dapo",
        epsilon=0.2,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=10**6,
    )
    texts = prompt_texts(workload, num_prompts=8 * workload.num_prompts)
    return trl.GRPOTrainer(
        model=str(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=_rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )


def _rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward_of(token_ids) for token_ids in completion_ids]


def _rollout(trainer: trl.GRPOTrainer, generation: Generation, lengths: tuple[int, ...]) -> Report:
    """`generate` alone, on the first prompts."""
    memory.reset_peak()
    rows = trainer.train_dataset["prompt"][: len(lengths) // trainer.num_generations]
    inputs = trainer.processing_class(
        [text for text in rows for _ in range(trainer.num_generations)], return_tensors="pt"
    )
    generation.forced = lengths
    limits = {"max_new_tokens": trainer.max_completion_length, "do_sample": True, "top_k": 0, "top_p": 1.0}
    start = time.perf_counter()
    with torch.no_grad():
        trainer.model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **limits)
    return Report(seconds=time.perf_counter() - start, peak_bytes=memory.peak(), lengths=generation.lengths)


def main() -> None:
    """Serve until the coordinator has had enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("descriptor", type=int)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reduced", action="store_true")
    settings = parser.parse_args()
    workload = WORKLOADS[settings.workload]
    workload = workload.reduced() if settings.reduced else workload
    channel = Channel(settings.descriptor)
    base_bytes = memory.current()
    trainer = make_trainer(workload, settings.folder, settings.folder / "trl")
    serve(trainer, channel, workload.max_new_tokens, base_bytes=base_bytes)


if __name__ == "__main__":
    main()
