"""Generated arithmetic with worked solutions: a reasoning task that needs no download."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from grpo_lightning.data.module import PromptDataModule, Row, Split
from grpo_lightning.functional.random import uniforms
from grpo_lightning.types import ConfigurationError, Stream

_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Arithmetic(PromptDataModule):
    """Chains of operations, applied from left to right, with one step of working each and the answer after ``#``.

    With ``kind: modular`` and modulus 10 every step keeps the last digit only::

        prompt          7+5-8=
        demonstration   7+5=2,2-8=4#4
        answer          4

    With ``kind: integer`` the running value is an ordinary integer. The train, validation and test splits are disjoint
    by construction: a hash of the problem itself says which split it belongs to.

    Args:
        kind: What a step computes.
        num_terms: Numbers per problem, >= 2: the level of the task; num_terms - 1 is the number of steps.
        max_term: Numbers are drawn from 0 to this.
        modulus: Of ``kind: modular``.
        operators: Drawn from, any of ``+-*``.
        num_train: Training problems.
        num_validation: Held-out problems for `validate`.
        num_test: Held-out problems for `test`.
        num_demonstrations: Worked training problems for the cold start.
        seed: Of the problems.
        evaluation_batch_size: Held-out problems completed at once, over all ranks.
    """

    def __init__(
        self,
        kind: Literal["modular", "integer"] = "modular",
        num_terms: int = 5,
        max_term: int = 9,
        modulus: int = 10,
        operators: str = "+-*",
        num_train: int = 20_000,
        num_validation: int = 512,
        num_test: int = 2_048,
        num_demonstrations: int = 20_000,
        seed: int = 0,
        evaluation_batch_size: int = 512,
    ) -> None:
        super().__init__(seed=seed, evaluation_batch_size=evaluation_batch_size)
        for name, value, least in (("num_terms", num_terms, 2), ("max_term", max_term, 1), ("modulus", modulus, 2)):
            if value < least:
                raise ConfigurationError(f"data.{name} must be >= {least}, got {value}.")
        if not operators or set(operators) - set(_APPLY):
            raise ConfigurationError(f"data.operators must be some of '+-*', got {operators!r}.")
        space = (max_term + 1) ** num_terms * len(set(operators)) ** (num_terms - 1)
        wanted = max(num_train, num_demonstrations) + num_validation + num_test
        if 2 * wanted > space:
            raise ConfigurationError(
                f"data: {wanted} different problems are more than half of the {space} that data.num_terms and "
                "data.max_term allow. Ask for fewer or raise the level."
            )
        self.kind, self.num_terms, self.max_term, self.modulus = kind, num_terms, max_term, modulus
        self.operators = operators
        self.sizes: dict[Split, int] = {"train": num_train, "validation": num_validation, "test": num_test}
        self.num_demonstrations = num_demonstrations

    def rows(self, split: Split) -> Sequence[Row]:
        """Prompt and answer of each problem of a split."""
        return self._problems[split][: self.sizes[split]]

    def demonstration_rows(self) -> Sequence[Row]:
        """Training problems with their working."""
        return self._problems["train"][: self.num_demonstrations]

    @cached_property
    def _problems(self) -> dict[Split, list[dict[str, Any]]]:
        shares = {**self.sizes, "train": max(self.sizes["train"], self.num_demonstrations)}
        problems: dict[Split, list[dict[str, Any]]] = {split: [] for split in shares}
        seen: set[str] = set()
        block = 0
        while any(len(problems[split]) < size for split, size in shares.items()):
            for digits, home in self._drawn(block):
                problem = self._problem(digits)
                split = _home(home, shares)
                if problem["prompt"] not in seen and len(problems[split]) < shares[split]:
                    seen.add(problem["prompt"])
                    problems[split].append(problem)
            block += 1
        return problems

    def _drawn(self, block: int, size: int = 8192) -> list[tuple[list[float], float]]:
        """Random numbers of some problems, and of the split that each belongs to."""
        numbers = torch.arange(size)[:, None]
        columns = torch.arange(2 * self.num_terms - 1)[None]
        drawn = uniforms(
            seed=self.seed, stream=Stream.DATA, iteration=block, slots=numbers, samples=columns * 0, positions=columns
        )
        choices = torch.where(columns % 2 == 0, drawn * (self.max_term + 1), drawn * len(self.operators)).long()
        # The split hangs on the content, not on the draw: the same problem drawn again falls into the same split.
        keys = (choices * torch.tensor([31**i % 1_000_003 for i in range(choices.shape[1])])).sum(dim=1)
        zero = torch.zeros_like(keys)
        homes = uniforms(seed=self.seed, stream=Stream.DATA, iteration=0, slots=keys, samples=zero + 1, positions=zero)
        return list(zip(choices.tolist(), homes.tolist(), strict=True))

    def _problem(self, choices: Sequence[float]) -> dict[str, Any]:
        terms, operators = choices[::2], [self.operators[int(i)] for i in choices[1::2]]
        value, steps, prompt = int(terms[0]), [], str(terms[0])
        for operator, term in zip(operators, terms[1:], strict=True):
            result = _APPLY[operator](value, int(term))
            result = result % self.modulus if self.kind == "modular" else result
            steps.append(f"{value}{operator}{term}={result}")
            value, prompt = result, f"{prompt}{operator}{term}"
        answer = str(value)
        return {"prompt": f"{prompt}=", "answer": answer, "demonstration": f"{','.join(steps)}#{answer}"}


def _home(number: float, shares: dict[Split, int]) -> Split:
    """The split of a problem whose hash, in [0, 1), is `number`."""
    if number < 0.2:
        return "validation" if number < 0.1 or not shares["test"] else "test"
    return "train"
