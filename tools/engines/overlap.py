"""Steps with and without `model.draw_ahead`: ``python -m tools.engines.overlap``.

One vLLM server has one core, the trainer the other, one thread each, in both kinds of runs, which are made in turn.
They train the quickstart's policy on completions of equal length, with a reward that every group has something to learn
from. `--num-epochs` balances the two: the more often completions are learned from, the longer an update takes beside a
rollout. Of each run the first iterations are left out, in which nothing is drawn ahead yet.

Accuracy with and without is compared by ``python -m tools.engines.learning``.
"""

import argparse
import csv
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from grpo_lightning.policy import PretrainedPolicy
from grpo_lightning.rollout.local_servers import LaunchedServers, LocalServers
from grpo_lightning.rollout.server import Server, patiently
from tools.benchmark.machine import describe
from tools.engines.learning import command

POLICY = "runs/quickstart/cold_start/policy"
ARMS = {"in turn": [], "ahead": ["configs/engine/draw_ahead.yaml"]}
TIMES = ("iteration", "generate", "generate_hidden", "score", "prepare", "update")
FIRST = 2
"""So many iterations of a run are left out."""
_START_SECONDS = 300.0
_LAST_LINES = 3000

Seconds = dict[str, float]


def medians(rows: Sequence[Mapping[str, str]], *, steps_per_iteration: int) -> Seconds:
    """The median seconds of an iteration and its phases.

    Args:
        rows: Of a run's metrics, one for each step; those of the steps before an iteration's end repeat the last one's.
        steps_per_iteration: How many steps an iteration has.
    """
    ends = [row for row in rows if row.get("time/iteration") and (int(row["step"]) + 1) % steps_per_iteration == 0]
    timed = ends[FIRST:]
    columns = {name: [float(row[f"time/{name}"]) for row in timed if row.get(f"time/{name}")] for name in TIMES}
    return {name: round(median(column), 4) for name, column in columns.items() if column}


def compared(rounds: Sequence[Mapping[str, Seconds]]) -> dict[str, float]:
    """By how much a step is shorter, as a share, and what a rollout takes in units of the rest of the step.

    Args:
        rounds: Of each round the medians of each arm.
    """
    plain, ahead = (median(found[arm]["iteration"] for found in rounds) for arm in ARMS)
    generate = median(found["in turn"]["generate"] for found in rounds)
    return {
        "in turn": plain,
        "ahead": ahead,
        "fall": round(1 - ahead / plain, 4),
        "generate_over_rest": round(generate / (plain - generate), 3),
    }


def trained(overlays: Sequence[str], url: str, arguments: argparse.Namespace) -> Seconds:
    """One run against the server."""
    steps = arguments.iterations * arguments.num_epochs
    callbacks = [{"class_path": "tools.benchmark.ours.EvenSum"}, {"class_path": "Throughput"}]
    length = str(arguments.max_new_tokens)
    settings = {
        "model.engine.urls": json.dumps([url]),
        "model.num_epochs": str(arguments.num_epochs),
        "model.prompts_per_iteration": str(arguments.num_prompts),
        "model.group_size": str(arguments.group_size),
        "model.sampling.max_new_tokens": length,
        "model.sampling.min_new_tokens": length,
        "trainer.callbacks": json.dumps(callbacks),
        "trainer.limit_val_batches": "0",
    }
    with TemporaryDirectory() as folder:
        words = command(["configs/engine/vllm_server.yaml", *overlays], seed=0, steps=steps, folder=Path(folder)) + [
            word for key, value in settings.items() for word in (f"--{key}", value)
        ]
        run = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if run.returncode:
            raise SystemExit(f"{overlays} failed:\n{run.stderr[-_LAST_LINES:]}")
        (file,) = Path(folder).rglob("metrics.csv")
        with file.open() as rows:
            return medians(list(csv.DictReader(rows)), steps_per_iteration=arguments.num_epochs)


def started(core: int) -> LaunchedServers:
    """A server on a core of its own, which answers."""
    os.sched_setaffinity(0, {core})
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    source = PretrainedPolicy(POLICY)
    local = LocalServers(kv_cache_gib=0.25, arguments=["--enforce-eager"])
    launched = LaunchedServers(local, source.load_model(seed=0), source.load_tokenizer(), torch.float32)
    servers = [Server(member.url) for member in launched.members]
    ends = time.monotonic() + _START_SECONDS
    patiently(lambda: servers[0].instances(timeout=30), servers, patience=30, grace=lambda: ends)
    return launched


def main() -> None:
    """Measure both kinds of runs in turn, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--num-epochs", type=int, default=16)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/engines_overlap.json"))
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the trainer, one for the server")
    conditions = {**describe(), **vars(arguments), "out": None}
    launched = started(cores[1])
    os.sched_setaffinity(0, {cores[0]})
    rounds: list[dict[str, Seconds]] = []
    try:
        for _ in range(arguments.rounds):
            rounds.append(
                {arm: trained(overlays, launched.members[0].url, arguments) for arm, overlays in ARMS.items()}
            )
            print(json.dumps(rounds[-1]), flush=True)
            found = {"conditions": conditions, "compared": compared(rounds), "rounds": rounds}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        launched.stop()
    print(json.dumps(found["compared"], indent=1))


if __name__ == "__main__":
    main()
