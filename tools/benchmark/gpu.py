"""Measure whole training steps on a GPU, with random weights in the shape of a 0.5B Qwen2.

    python -m tools.benchmark.gpu --output runs/gpu

IT HAS NOT RUN ON A GPU YET: only ``--device cpu --reduced``, which runs the same code with a tiny model, was tried.

An iteration is a rollout of 4 prompts of 1,024 tokens with 16 completions each of up to 1,024 (random weights hardly
ever end one earlier), and one update on all of it, a prompt with its group at a time; compute in bf16, master weights
in fp32. Written are the seconds of each phase, decoded tokens per second, the update's MFU and the peak memory, by
`Throughput`, for each iteration after the first. Before that the numbers are checked on the device: a small model's
log-probabilities and gradients in fp32 must be the same padded, packed and with shared prefixes.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from grpo_lightning.batching import Layout, Packed, Padded, Row, SharedPrefix
from grpo_lightning.callbacks.throughput import Throughput, measured_flops
from grpo_lightning.policy import Policy, PolicySource
from tools.benchmark import machine
from tools.benchmark.model_folder import EOS, PAD, word_tokenizer
from tools.benchmark.ours import EvenSum, RandomPrompts, make_module
from tools.benchmark.workloads import ModelShape, Workload

KEY_HEADS = 2
PRECISION = "bf16-mixed"
TOLERANCE = 1e-4
"""fp32 rounds to 6e-8; sums over some hundred terms in two layers, in another order, stay well below."""
HALF_BILLION = Workload(
    name="0.5B",
    model=ModelShape(vocabulary=151_936, hidden=896, intermediate=4864, layers=24, heads=14),
    num_prompts=4,
    prompt_tokens=1024,
    group_size=16,
    max_new_tokens=1024,
    is_ragged=True,
)
TINY = Workload(
    name="tiny",
    model=ModelShape(vocabulary=128, hidden=64, intermediate=96, layers=2, heads=4),
    num_prompts=2,
    prompt_tokens=16,
    group_size=4,
    max_new_tokens=8,
    is_ragged=True,
)
_LAYOUTS: dict[str, Layout] = {"padded": Padded(), "packed": Packed(), "shared_prefix": SharedPrefix()}


class RandomQwen2(PolicySource):
    """A Qwen2 with random weights in fp32, and one word per token.

    Args:
        shape: Its shape; all but the number of its key-value heads, `KEY_HEADS`.
        max_positions: Longest sequence.
    """

    def __init__(self, shape: ModelShape, max_positions: int) -> None:
        self._vocabulary = shape.vocabulary
        self._config = Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=KEY_HEADS,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """See `word_tokenizer`."""
        return word_tokenizer(self._vocabulary)

    def load_model(self, *, seed: int) -> PreTrainedModel:
        """Draw the weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Qwen2ForCausalLM(copy.deepcopy(self._config))


class Iterations(Callback):
    """Keeps what `Throughput`, which must come before it, logs of each iteration."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Add a row at an iteration's end."""
        if batch.ends_iteration:
            metrics = trainer.callback_metrics.items()
            self.rows.append({k: float(v) for k, v in metrics if k.startswith(("time/", "throughput/"))})


def layout_differences(device: torch.device) -> dict[str, dict[str, float]]:
    """How far packed and shared-prefix are from padded, on a small model in fp32.

    Args:
        device: On which to compute.

    Returns:
        By layout, of the ``logprobs`` the largest difference, and of the ``gradients`` of their sum the largest one of
        any weight relative to the largest gradient.
    """
    source = RandomQwen2(ModelShape(vocabulary=512, hidden=256, intermediate=512, layers=2, heads=4), 256)
    policy = Policy(source.load_model(seed=0).to(device), source.load_tokenizer())
    generator = torch.Generator().manual_seed(0)
    rows = []
    for slot, (prompt_tokens, lengths) in enumerate([(100, (5, 60, 31)), (7, (1, 2)), (33, (40,))]):
        prompt = torch.randint(512, (prompt_tokens,), generator=generator)
        rows += [Row(slot, prompt, torch.randint(512, (length,), generator=generator)) for length in lengths]
    (logprobs, gradients), *others = [_scored(policy, layout, rows, device) for layout in _LAYOUTS.values()]
    return {
        name: {
            "logprobs": float((its_logprobs - logprobs).abs().max()),
            "gradients": float((its_gradients - gradients).abs().max() / gradients.abs().max()),
        }
        for name, (its_logprobs, its_gradients) in zip(list(_LAYOUTS)[1:], others, strict=True)
    }


def _scored(policy: Policy, layout: Layout, rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the gradients of their sum, flat."""
    policy.zero_grad()
    logprobs_BT = policy(layout.lay_out(rows, device), 1.0).logprobs_BT
    logprobs_BT.sum().backward()
    return logprobs_BT.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def measure(workload: Workload, device: torch.device, *, num_steps: int, peak_flops: float) -> list[dict[str, float]]:
    """What `Throughput` finds in each of some iterations, after one that warms up.

    Args:
        workload: What a step does.
        device: On which to train.
        num_steps: That count.
        peak_flops: Operations per second, to which the MFU is relative.
    """
    policy = RandomQwen2(workload.model, workload.prompt_tokens + workload.max_new_tokens)
    iterations = Iterations()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=PRECISION,
        max_epochs=-1,
        max_steps=num_steps + 1,
        accumulate_grad_batches=workload.num_prompts,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[EvenSum(), Throughput(peak_flops=peak_flops), iterations],
    )
    trainer.fit(make_module(workload, policy, is_fused=False), RandomPrompts(workload))
    return iterations.rows[1:]


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print, write; 1 without the device, or where the layouts differ."""
    settings = _parser().parse_args(arguments)
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 1
    differences = layout_differences(device)
    print(f"layouts against padded, fp32: {differences}", flush=True)
    workload = TINY if settings.reduced else HALF_BILLION
    width = 256 if settings.reduced else 8192
    peak = settings.peak_flops or measured_flops(torch.empty(0, dtype=torch.bfloat16, device=device), width=width)
    rows = measure(workload, device, num_steps=settings.steps, peak_flops=peak)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    for name, value in medians.items():
        print(f"{name:44} {value:12.4g}")
    measured = {
        "workload": asdict(workload),
        "peak_flops": peak,
        "peak_flops_measured": settings.peak_flops is None,
        "layout_differences": differences,
        "medians": medians,
        "iterations": rows,
    }
    _write(measured, device, settings.output)
    return int(any(value > TOLERANCE for of_layout in differences.values() for value in of_layout.values()))


def _write(measured: dict[str, Any], device: torch.device, folder: Path) -> None:
    described = {
        **machine.describe(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": PRECISION,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(described | measured, indent=1) + "\n")
    print(f"Written to {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=3, help="counted iterations; one more comes first")
    parser.add_argument("--peak-flops", type=float, help="of the device in bf16; left out, it is measured")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the JSON")
    parser.add_argument("--reduced", action="store_true", help="a tiny model, to try the benchmark")
    return parser


if __name__ == "__main__":
    sys.exit(main())
