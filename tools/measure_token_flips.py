"""How often does a sampled token depend on what else is in the batch?

In exact arithmetic never: a token is a function of the weights and of its coordinates alone. Matrix products of another
shape add up in another order, though, so that logits differ in their last bits, and a draw whose random number falls
between the two roundings of a boundary goes to the neighbouring token: the token flips. This script draws the same
completions twice, in batches of different sizes, and counts the first differences::

    python tools/measure_token_flips.py --num-tokens 100000 --dtype float32

What comes after a flip is another completion, and is not counted. The policies are random; the larger their weights,
the larger their logits and their rounding, and the more peaked their distributions.
"""

import argparse
import os
import platform
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.types import Completion, Coordinates, GenerationRequest, SamplingParams, Stream

GROUP_SIZE, MAX_NEW_TOKENS = 8, 64


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What was compared. Example: ``a b c`` and ``a x c`` are two tokens compared, of which the second flipped."""

    num_tokens: int = 0
    num_flips: int = 0
    largest_difference: float = 0.0
    """Of the log-probabilities of tokens that agree, in nats."""
    negative_logprobs: float = 0.0
    """Summed over the tokens compared: divided by their number, an estimate of the distributions' entropy."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            num_tokens=self.num_tokens + other.num_tokens,
            num_flips=self.num_flips + other.num_flips,
            largest_difference=max(self.largest_difference, other.largest_difference),
            negative_logprobs=self.negative_logprobs + other.negative_logprobs,
        )

    @property
    def rate(self) -> str:
        """Flips per token with the standard error of a count; the 95 % bound where none was seen."""
        if not self.num_flips:
            return f"< {3 / max(self.num_tokens, 1):.0e} (95 %)"
        return f"{self.num_flips / self.num_tokens:.1e} ± {self.num_flips**0.5 / self.num_tokens:.0e}"


def compare(one: Completion, other: Completion) -> Tally:
    """Compare two draws of one completion, token by token up to the first that differs."""
    pairs = list(zip(one.token_ids, other.token_ids, strict=False))
    num_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    equal = list(zip(one.sampler_logprobs, other.sampler_logprobs, strict=False))[:num_equal]
    num_tokens = min(num_equal + 1, len(pairs))
    return Tally(
        num_tokens=num_tokens,
        num_flips=num_tokens - num_equal,
        largest_difference=max((abs(a - b) for a, b in equal), default=0.0),
        negative_logprobs=-sum(one.sampler_logprobs[:num_tokens]),
    )


def random_policy(source: CharacterPolicy, weight_std: float, dtype: torch.dtype) -> PreTrainedModel:
    """A policy whose matrices are normal with this standard deviation."""
    model = source.load_model(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, weight_std, generator=generator)
    return model.to(dtype=dtype)


def requests(num_prompts: int, vocabulary: int) -> list[GenerationRequest]:
    """Prompts of 4 to 23 tokens."""
    prompts = [tuple(3 + (7 * i + 5 * j) % (vocabulary - 3) for j in range(4 + i % 20)) for i in range(num_prompts)]
    return [GenerationRequest(slot=i, token_ids=p, num_completions=GROUP_SIZE) for i, p in enumerate(prompts)]


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: argparse.Namespace) -> Tally:
    """Draw rollouts in batches of both sizes, until enough tokens have been compared."""
    engines = [InProcessEngine(max_rows=number) for number in settings.rows]
    for engine in engines:
        engine.setup(model, tokenizer, frozenset({tokenizer.eos_token_id}))
    prompts, sampling = requests(settings.num_prompts, len(tokenizer)), SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    tally, iteration = Tally(), 0
    while tally.num_tokens < settings.num_tokens:
        coordinates = Coordinates(seed=0, stream=Stream.TRAINING, iteration=iteration)
        tally = sum(map(compare, *(engine.generate(prompts, sampling, coordinates) for engine in engines)), tally)
        iteration += 1
    return tally


def main(arguments: list[str] | None = None) -> None:
    """Print the conditions, and a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=100_000, help="to compare for each policy")
    parser.add_argument("--weight-std", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], help="of each policy")
    parser.add_argument("--rows", type=int, nargs=2, default=[256, 37], help="completions decoded at once")
    parser.add_argument("--num-prompts", type=int, default=64, help="of a rollout")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    settings = parser.parse_args(arguments)
    print(
        f"{settings.dtype}, batches of at most {settings.rows[0]} against {settings.rows[1]} rows, CharacterPolicy of "
        f"4 layers of width 128, up to {MAX_NEW_TOKENS} new tokens at temperature 1\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} threads, {platform.machine()}\n\n"
        f"{'weight std':>10} {'nats/token':>10} {'tokens':>10} {'flips':>6} {'largest log-prob difference':>28}  rate"
    )
    source, total = CharacterPolicy(), Tally()
    for weight_std in settings.weight_std:
        model = random_policy(source, weight_std, getattr(torch, settings.dtype))
        tally = measure(model, source.load_tokenizer(), settings)
        _print_line(str(weight_std), tally)
        total += tally
    _print_line("all", total)


def _print_line(name: str, tally: Tally) -> None:
    entropy = tally.negative_logprobs / max(tally.num_tokens, 1)
    print(
        f"{name:>10} {entropy:>10.2f} {tally.num_tokens:>10} {tally.num_flips:>6} {tally.largest_difference:>28.1e}  "
        f"{tally.rate}",
        flush=True,
    )


if __name__ == "__main__":
    main()
