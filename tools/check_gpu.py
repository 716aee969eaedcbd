"""Check the strategies on one GPU, in one command.

    python -m tools.check_gpu --output runs/check_gpu

IT HAS NOT RUN ON A GPU YET: only ``--device cpu --reduced``, which runs the same code with tiny models, was tried.

For single, fsdp2 and deepspeed_2, each in a process of its own:

* A small model makes an update on completions that one process on the CPU has drawn. Its log-probabilities of fixed
  tokens, loss and gradient norm are compared with those of the CPU in fp32: once computed in fp32, once in bf16. See
  `TOLERANCES`.
* A model with random weights in the shape of a 0.5B Qwen2 makes two iterations in bf16 with fp32 master weights;
  printed are the seconds, the peak memory, loss and gradient norm.

The exit status is 1 where a number is further off than its tolerance, or not finite.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.batching import Padded, Row
from grpo_lightning.callbacks.gradient_norm import GradientNorm
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.strategies import FSDP2Strategy, ZeROStrategy
from grpo_lightning.types import Completion, Coordinates, GenerationRequest, SamplingParams
from tools.benchmark import machine, memory
from tools.benchmark.gpu import HALF_BILLION, TINY, RandomQwen2
from tools.benchmark.ours import EvenSum, RandomPrompts, make_module
from tools.benchmark.workloads import ModelShape, Workload

STRATEGIES = ("single", "fsdp2", "deepspeed_2")
DTYPES = ("fp32", "bf16")
NUMBERS = ("logprobs", "loss", "gradient_norm")
TOLERANCES = {"fp32": {"logprobs": 1e-4, "loss": 1e-5, "gradient_norm": 1e-4}, "bf16": dict.fromkeys(NUMBERS, 0.05)}
"""Largest difference of any log-probability, and of the losses; of the gradient norms relative to the CPU's.

fp32 rounds to 6e-8 and bf16 to 4e-3; the sums of some layers, in another order, stay well below these.
"""
SMALL = Workload(
    name="small",
    model=ModelShape(vocabulary=512, hidden=256, intermediate=512, layers=4, heads=4),
    num_prompts=4,
    prompt_tokens=32,
    group_size=8,
    max_new_tokens=32,
)
ITERATIONS = 2


class Recorded(InProcessEngine):
    """Draws the completions of the first iteration, or gives those that another run has drawn."""

    def __init__(self, completions: Sequence[Completion] | None = None) -> None:
        super().__init__()
        self.completions = completions

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """In the order of the requests, which is the same in every run."""
        if self.completions is None:
            self.completions = super().generate(requests, sampling, coordinates)
        return list(self.completions)


class Numbers(Callback):
    """Keeps what is compared: the log-probabilities of fixed tokens at the start, the first loss and gradient norm."""

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        prompt, *completions = (torch.randint(vocabulary, (n,), generator=generator) for n in (12, 8, 5))
        self.rows = [Row(0, prompt, completion) for completion in completions]
        self.logprobs: list[float] = []
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the fixed tokens as an update does."""
        laid_out = Padded().lay_out(self.rows, pl_module.device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            scores = pl_module.policy(laid_out, 1.0)
        self.logprobs = scores.logprobs_BT.float().flatten().tolist()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        """Of an update, which is a micro-batch here."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.gradient_norms.append(float(trainer.callback_metrics["policy/gradient_norm"]))


def train(
    workload: Workload, strategy: str, dtype: str, device: str, *, num_steps: int, engine: InProcessEngine
) -> Numbers:
    """Make some iterations of one update each.

    Args:
        workload: What an iteration does.
        strategy: One of `STRATEGIES`.
        dtype: One of `DTYPES`, to compute in.
        device: ``cuda`` or ``cpu``.
        num_steps: That many iterations.
        engine: Draws the completions.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    is_half = dtype == "bf16"
    trainer_strategy: Any = {
        "single": lambda: "auto",
        "fsdp2": lambda: FSDP2Strategy(compute_dtype="bfloat16" if is_half else None),
        "deepspeed_2": lambda: ZeROStrategy(stage=2),
    }[strategy]()
    numbers = Numbers(workload.model.vocabulary)
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        strategy=trainer_strategy,
        precision="bf16-mixed" if is_half and strategy != "fsdp2" else "32-true",
        max_epochs=-1,
        max_steps=num_steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[EvenSum(), GradientNorm(), numbers],
    )
    source = RandomQwen2(workload.model, workload.prompt_tokens + workload.max_new_tokens)
    module = make_module(workload, source, is_fused=False)
    module.engine = engine
    trainer.fit(module, RandomPrompts(workload))
    return numbers


def differences(found: Numbers, expected: Numbers) -> dict[str, float]:
    """By name, how far the numbers of the first update are from those of the CPU, see `TOLERANCES`."""
    pairs = zip(found.logprobs, expected.logprobs, strict=True)
    norm = expected.gradient_norms[0]
    return {
        "logprobs": max(abs(a - b) for a, b in pairs),
        "loss": abs(found.losses[0] - expected.losses[0]),
        "gradient_norm": abs(found.gradient_norms[0] - norm) / norm,
    }


def is_within(found: dict[str, float], tolerances: dict[str, float]) -> bool:
    """Whether every number is finite and close enough."""
    return all(found[name] <= tolerance for name, tolerance in tolerances.items())  # not so where it is NaN


def check(strategy: str, device: str, *, is_reduced: bool) -> dict[str, Any]:
    """All that is said of one strategy."""
    small = TINY if is_reduced else SMALL
    engine = Recorded()
    expected = train(small, "single", "fp32", "cpu", num_steps=1, engine=engine)
    compared = {
        dtype: differences(
            train(small, strategy, dtype, device, num_steps=1, engine=Recorded(engine.completions)), expected
        )
        for dtype in DTYPES
    }
    _reset_peak(device)
    start = time.perf_counter()
    large = TINY if is_reduced else HALF_BILLION
    run = train(large, strategy, "bf16", device, num_steps=ITERATIONS, engine=InProcessEngine())
    is_finite = all(map(math.isfinite, [*run.losses, *run.gradient_norms]))
    return {
        "strategy": strategy,
        "differences": compared,
        "model": large.name,
        "seconds": time.perf_counter() - start,
        "peak_gib": _peak(device) / 2**30,
        "losses": run.losses,
        "gradient_norms": run.gradient_norms,
        "is_right": is_finite and all(is_within(compared[dtype], TOLERANCES[dtype]) for dtype in DTYPES),
    }


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        memory.reset_peak()


def _peak(device: str) -> int:
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else memory.peak()


def described(found: dict[str, Any]) -> str:
    """What a person reads of a strategy."""
    lines = [f"{found['strategy']}: {'right' if found['is_right'] else 'WRONG'}"]
    for dtype, of_dtype in found["differences"].items():
        pairs = ", ".join(f"{name} {value:.1e} <= {TOLERANCES[dtype][name]:g}" for name, value in of_dtype.items())
        lines.append(f"  small model in {dtype} against the CPU in fp32: {pairs}")
    lines.append(
        f"  {found['model']} in bf16, {ITERATIONS} iterations: {found['seconds']:.1f} s, {found['peak_gib']:.2f} GiB, "
        f"losses {found['losses']}, gradient norms {found['gradient_norms']}"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Check every strategy, print, write; 1 without the device, or where something is wrong."""
    settings = _parser().parse_args(arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 1
    if settings.only is not None:
        found = check(settings.only, settings.device, is_reduced=settings.reduced)
        settings.output.write_text(json.dumps(found))
        return 0
    results = [_in_a_process(strategy, settings) for strategy in settings.strategies]
    written = {**machine.describe(), "device": _name(settings.device), "torch": torch.__version__, "results": results}
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "check_gpu.json").write_text(json.dumps(written, indent=1) + "\n")
    return int(not all(found["is_right"] for found in results))


def _in_a_process(strategy: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Of its own: a strategy leaves its process group behind."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "tools.check_gpu", "--only", strategy, "--device", settings.device]
        command += ["--output", str(file), *(["--reduced"] if settings.reduced else [])]
        status = subprocess.run(command, check=False).returncode
        found = json.loads(file.read_text()) if status == 0 else {"strategy": strategy, "is_right": False}
    print(described(found) if status == 0 else f"{strategy}: FAILED, status {status}", flush=True)
    return found


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--output", type=Path, default=Path("runs/check_gpu"), help="folder of the JSON")
    parser.add_argument("--reduced", action="store_true", help="tiny models, to try the check")
    parser.add_argument("--only", choices=STRATEGIES, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
