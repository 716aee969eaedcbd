"""The quickstart with each engine: ``python -m tools.engines.learning``.

Every run is the shipped config, with the overlay of its engine and the default algorithm, whose correction makes up for
what the sampler's rounding does, and its age where servers draw ahead.
``--seeds 0 --steps 40`` shows whether all of them work.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from tools.benchmark.machine import describe

ENGINES = {
    "InProcessEngine": ["configs/engine/inprocess.yaml"],
    "VLLMEngine": ["configs/engine/vllm.yaml"],
    "VLLMServerEngine": ["configs/engine/vllm_local.yaml"],
    "VLLMServerEngine ahead": ["configs/engine/vllm_local.yaml", "configs/engine/draw_ahead.yaml"],
}
DIFFERENCE = "sampler/logprob_difference"
ACCURACY = "validation/accuracy"
_LAST_LINES = 3000


def command(overlays: Sequence[str], *, seed: int, steps: int, folder: Path) -> list[str]:
    """What trains one policy.

    Args:
        overlays: Of the engine.
        seed: Of every random number of the run.
        steps: Optimizer steps.
        folder: Where the run writes.
    """
    configs = ["configs/quickstart.yaml", *overlays, "configs/algorithm/default.yaml"]
    logger = {"class_path": "grpo_lightning.appending_csv.AppendingCSVLogger", "init_args": {"save_dir": str(folder)}}
    return [
        *(sys.executable, "-m", "grpo_lightning", "fit"),
        *(word for config in configs for word in ("--config", config)),
        *("--model.seed", str(seed), "--seed_everything", str(seed)),
        *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)),
        *("--trainer.logger", json.dumps(logger)),
        *("--trainer.callbacks", json.dumps([{"class_path": "ExactAnswer", "init_args": {"marker": "#"}}])),
        *("--trainer.enable_checkpointing", "false"),
    ]


def curves(folder: Path) -> dict[str, list[float]]:
    """The values that a run has logged of its held-out accuracy and of its sampler's difference, in their order."""
    (file,) = folder.rglob("metrics.csv")
    with file.open() as rows:
        logged = list(csv.DictReader(rows))
    return {name: [float(row[name]) for row in logged if row.get(name)] for name in (ACCURACY, DIFFERENCE)}


def trained(overlays: Sequence[str], *, seed: int, steps: int) -> dict[str, Any]:
    """One run: its last held-out accuracy, its differences of log-probs and its seconds."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = subprocess.run(
            command(overlays, seed=seed, steps=steps, folder=Path(folder)), capture_output=True, text=True
        )
        if run.returncode:
            raise SystemExit(f"{overlays} failed:\n{run.stderr[-_LAST_LINES:]}")
        found = curves(Path(folder))
        return {
            "seed": seed,
            "seconds": round(time.perf_counter() - start, 1),
            "accuracy": found[ACCURACY][-1],
            "mean_difference": mean(found[DIFFERENCE]),
            "largest_mean_difference": max(found[DIFFERENCE]),
        }


def main() -> None:
    """Train with every engine and seed, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--out", type=Path, default=Path("docs/figures/engines_learning.json"))
    arguments = parser.parse_args()
    conditions = {**describe(), "steps": arguments.steps}
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in arguments.engines}
    for seed in arguments.seeds:
        for engine in arguments.engines:
            run = trained(ENGINES[engine], seed=seed, steps=arguments.steps)
            runs[engine].append(run)
            print(engine, run, flush=True)
            arguments.out.write_text(json.dumps({"conditions": conditions, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
