"""vLLM alone against our engines on the same requests, and what a sync costs: ``python -m tools.engines.throughput``.

Raw rounds ask the same vLLM for the same completions with the same settings, without sync, checksums, comparison of
log-probs or texts. The two are measured in turn, in one process, and the medians compared. A round of ours takes over a
new version of all weights first, as every iteration of a training does; ``without_sync`` is one where nothing changed.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from grpo_lightning.policy import CharacterPolicy, NamedWeights
from grpo_lightning.rollout import VLLMEngine, VLLMServerEngine
from grpo_lightning.rollout.local_servers import LocalServers
from grpo_lightning.rollout.vllm import completion_seeds, vllm_sampling
from grpo_lightning.rollout.weight_sync import WeightCopyEngine
from grpo_lightning.types import Coordinates, GenerationRequest, SamplingParams, Stream
from tools.benchmark.machine import describe

COORDINATES = Coordinates(seed=0, stream=Stream.TRAINING, iteration=0)
POLICY = CharacterPolicy(hidden_size=640, num_layers=8, num_heads=10, intermediate_size=1792)


def requests(num_prompts: int, group_size: int) -> list[GenerationRequest]:
    """Prompts of 32 tokens that share nothing."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 60, (num_prompts, 32), generator=generator).tolist()
    return [
        GenerationRequest(slot=slot, token_ids=tuple(prompt), num_completions=group_size)
        for slot, prompt in enumerate(prompts)
    ]


def raw_colocated(
    engine: VLLMEngine, wanted: list[GenerationRequest], sampling: SamplingParams
) -> Callable[[], list[list[int]]]:
    """What vLLM's own class draws for these requests."""
    from vllm import SamplingParams as VLLMSamplingParams

    prompts = [{"prompt_token_ids": list(r.token_ids)} for r in wanted for _ in range(r.num_completions)]
    settings = vllm_sampling(sampling, engine._eos_token_ids)
    params = [VLLMSamplingParams(**settings, seed=seed) for seed in completion_seeds(wanted, COORDINATES)]

    def draw() -> list[list[int]]:
        engine._started.reset_prefix_cache()
        outputs = engine._started.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return draw


def raw_served(
    engine: VLLMServerEngine, wanted: list[GenerationRequest], sampling: SamplingParams
) -> Callable[[], list[list[int]]]:
    """What the server answers to these requests, as many at once as the engine asks for."""
    settings = {**vllm_sampling(sampling, engine._eos_token_ids), "return_token_ids": True}
    del settings["detokenize"]
    prompts = [list(r.token_ids) for r in wanted for _ in range(r.num_completions)]
    seeds = completion_seeds(wanted, COORDINATES)
    bodies = [{**settings, "prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]

    def draw() -> list[list[int]]:
        (server,) = engine._servers
        server.post("/reset_prefix_cache", {}, timeout=60)
        with ThreadPoolExecutor(64) as pool:
            answers = pool.map(lambda body: server.post("/v1/completions", body, timeout=600), bodies)
            return [answer["choices"][0]["token_ids"] for answer in answers]

    return draw


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compared(engine: WeightCopyEngine, raw: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates in tokens per second, their quotient, and the time of a sync."""
    model, tokenizer = POLICY.load_model(seed=0), POLICY.load_tokenizer()
    wanted = requests(arguments.num_prompts, arguments.group_size)
    sampling = SamplingParams(max_new_tokens=arguments.max_new_tokens, min_new_tokens=arguments.max_new_tokens)
    engine.setup(model, tokenizer, frozenset({1}))
    version = 0

    @torch.no_grad()
    def update() -> None:
        nonlocal version
        version += 1
        for parameter in model.parameters():  # to another value, and back
            parameter.mul_(1 + 2**-7 if version % 2 else 1 / (1 + 2**-7))
        engine.update_weights(NamedWeights(model), version)

    def ours() -> list[list[int]]:
        return [list(c.token_ids) for c in engine.generate(wanted, sampling, COORDINATES)]

    update()
    expected = ours()  # also compiles what is compiled at the first call
    draw = raw(engine, wanted, sampling)
    assert draw() == expected, "the same requests have the same answers"
    times: dict[str, list[float]] = {"raw": [], "ours": [], "without_sync": [], "sync": []}
    for _ in range(arguments.rounds):
        times["raw"].append(seconds(draw))
        times["without_sync"].append(seconds(ours))
        update()
        times["ours"].append(seconds(ours))
        update()
        times["sync"].append(seconds(engine.synchronise))
    engine.close()
    num_tokens = sum(map(len, expected))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": num_tokens,
        "raw_tokens_per_second": num_tokens / median(times["raw"]),
        "tokens_per_second": num_tokens / median(times["ours"]),
        "share_of_raw": median(times["raw"]) / median(times["ours"]),
        "share_of_raw_without_sync": median(times["raw"]) / median(times["without_sync"]),
        "sync_seconds": median(times["sync"]),
    }


def main() -> None:
    """Compare both engines, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/engines_throughput.json"))
    arguments = parser.parse_args()
    local = LocalServers(kv_cache_gib=0.5, arguments=["--enforce-eager"])
    cases = {
        "VLLMEngine": (VLLMEngine(kv_cache_gib=0.5, enforce_eager=True), raw_colocated),
        "VLLMServerEngine": (VLLMServerEngine(local=local), raw_served),
    }
    conditions = {**describe(), **vars(arguments), "out": None}
    found = {name: compared(engine, raw, arguments) for name, (engine, raw) in cases.items()}
    print(json.dumps(found, indent=1))
    arguments.out.write_text(json.dumps({"conditions": conditions, "engines": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
