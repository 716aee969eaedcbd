"""How fast does the in-process engine draw completions, beside transformers' `generate` with the same model?

Both draw the same number of tokens from the full distribution, in turn, in one process; `generate` gets every prompt
once per completion, as trainers hand it over, and ends its completions where ours ended::

    python tools/benchmark_rollout.py --workloads W1 W2 W3 --pairs 5 --threads 2 --output rollout.json

The seconds that pass are what counts on a quiet machine. On a busy one, read the processor's seconds instead: they
leave out what other processes took, though not what they did to the caches. Weights are random.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.types import Completion, Coordinates, GenerationRequest, SamplingParams, Stream

EOS = 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A rollout: a Llama's shape, P prompts, G completions of each.

    `goal` is the ratio of tokens per second, ours over `generate`'s, that is aimed at; None for no goal. Where the
    lengths are ragged, the end of sequence is a token like any other, so that they are geometric with mean V.
    """

    vocabulary: int = 64
    width: int = 256
    intermediate: int = 688
    num_layers: int = 4
    num_heads: int = 4
    num_prompts: int
    prompt_tokens: int
    group_size: int
    max_new_tokens: int
    is_ragged: bool = False
    goal: float | None = None


WORKLOADS = {
    "W1": Workload(num_prompts=8, prompt_tokens=16, group_size=8, max_new_tokens=128, goal=1.1),
    "W2": Workload(num_prompts=4, prompt_tokens=512, group_size=16, max_new_tokens=64, goal=6.0),
    "W3": Workload(num_prompts=8, prompt_tokens=16, group_size=8, max_new_tokens=384, is_ragged=True, goal=2.5),
    "W4": Workload(
        vocabulary=151_936, num_layers=2, num_prompts=8, prompt_tokens=16, group_size=8, max_new_tokens=64
    ),
    "W5": Workload(
        vocabulary=32_000, width=512, intermediate=1368, num_layers=8, num_heads=8,
        num_prompts=4, prompt_tokens=256, group_size=8, max_new_tokens=128,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One rollout."""

    num_tokens: int
    seconds: float
    processor_seconds: float
    """Of this process, over all its threads."""


class EndsAt(StoppingCriteria):
    """Ends each row of `generate` at its own length."""

    def __init__(self, lengths_B: Tensor, prompt_tokens: int) -> None:
        self._ends_B = lengths_B + prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        """Which rows are done."""
        return self._ends_B <= input_ids.shape[1]


class Contest:
    """Both ways of drawing one workload's completions."""

    def __init__(self, workload: Workload, max_rows: int | None) -> None:
        self._workload = workload
        self._model = _model(workload)
        self._engine = InProcessEngine(max_rows=max_rows)
        self._engine.setup(
            self._model, CharacterPolicy().load_tokenizer(), frozenset({EOS} if workload.is_ragged else ())
        )
        generator = torch.Generator().manual_seed(1)
        shape = (workload.num_prompts, workload.prompt_tokens)
        self._prompts = torch.randint(2, workload.vocabulary, shape, generator=generator)

    def engine(self, iteration: int) -> list[Completion]:
        """The completions of the in-process engine."""
        requests = [
            GenerationRequest(slot=i, token_ids=tuple(prompt), num_completions=self._workload.group_size)
            for i, prompt in enumerate(self._prompts.tolist())
        ]
        sampling = SamplingParams(max_new_tokens=self._workload.max_new_tokens)
        coordinates = Coordinates(seed=0, stream=Stream.TRAINING, iteration=iteration)
        return self._engine.generate(requests, sampling, coordinates)

    @torch.no_grad()
    def generate(self, lengths: Sequence[int]) -> None:
        """The same with transformers, a row per completion."""
        prompts = self._prompts.repeat_interleave(self._workload.group_size, dim=0)
        ends = EndsAt(torch.tensor(lengths), self._workload.prompt_tokens)
        self._model.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=self._workload.max_new_tokens,
            stopping_criteria=StoppingCriteriaList([ends]),
        )

    def pair(self, iteration: int) -> tuple[Timing, Timing]:
        """One rollout of each."""
        completions: list[Completion] = []
        seconds = timed(lambda: completions.extend(self.engine(iteration)))
        lengths = [len(completion.token_ids) for completion in completions]
        return timing(sum(lengths), seconds), timing(sum(lengths), timed(lambda: self.generate(lengths)))


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds that passed, and those of the processor."""
    start, processor_start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - processor_start


def timing(num_tokens: int, seconds: tuple[float, float]) -> Timing:
    """A rollout's tokens with what `timed` measured."""
    return Timing(num_tokens=num_tokens, seconds=seconds[0], processor_seconds=seconds[1])


def summarize(pairs: Sequence[tuple[Timing, Timing]]) -> dict[str, float]:
    """Medians over pairs: of tokens per second, and of the ratios within each pair, which what both suffered leaves."""
    return {
        "engine_tokens_per_second": statistics.median(ours.num_tokens / ours.seconds for ours, _ in pairs),
        "generate_tokens_per_second": statistics.median(its.num_tokens / its.seconds for _, its in pairs),
        "ratio": statistics.median(its.seconds / ours.seconds for ours, its in pairs),
        "processor_ratio": statistics.median(its.processor_seconds / ours.processor_seconds for ours, its in pairs),
    }


def conditions() -> dict[str, str | int | list[float]]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "processors": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _model(workload: Workload) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.width,
        intermediate_size=workload.intermediate,
        num_hidden_layers=workload.num_layers,
        num_attention_heads=workload.num_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def main(arguments: list[str] | None = None) -> None:
    """Print the conditions and a line per workload; write both as JSON, with every timing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=sorted(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=5, help="of rollouts, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-rows", type=int, default=InProcessEngine().max_rows, help="of the engine")
    parser.add_argument("--output", type=Path, help="JSON file")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    result: dict[str, object] = {"conditions": conditions(), "max_rows": settings.max_rows}
    print(json.dumps(result), flush=True)
    print(f"{'':>4} {'engine':>10} {'generate':>10}   {'ratio':>6} {'processor':>9} {'goal':>5}  (tokens/s)")
    for name in settings.workloads:
        contest = Contest(WORKLOADS[name], settings.max_rows)
        pairs = [contest.pair(iteration) for iteration in range(settings.pairs + 1)][1:]
        found = summarize(pairs)
        result[name] = {
            **found, "workload": asdict(WORKLOADS[name]), "pairs": [[asdict(one) for one in pair] for pair in pairs]
        }  # fmt: skip
        ours, its, ratio, processor = found.values()
        goal = WORKLOADS[name].goal or "-"
        print(f"{name:>4} {ours:>10,.0f} {its:>10,.0f}   {ratio:>6.2f} {processor:>9.2f} {goal:>5}", flush=True)
    if settings.output is not None:
        settings.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
