"""Generated arithmetic with worked solutions: a reasoning task that needs no download."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, Literal, get_args

import torch

from grpo_lightning.data.encoding import Row, Split
from grpo_lightning.data.module import PromptDataModule, require
from grpo_lightning.data.problems import (
    Problem,
    Rule,
    Working,
    bounded,
    bracketed,
    chain,
    integer,
    modular,
    rounded,
    write_working,
)
from grpo_lightning.functional.random import uniforms
from grpo_lightning.types import ConfigurationError, Stream

Kind = Literal["modular", "integer", "bounded", "brackets"]
OPERATORS: dict[Kind, str] = {"modular": "+-*", "integer": "+-*", "bounded": "+-", "brackets": "+-*"}
HELD_OUT_SHARE = 0.1
"""The share of all problems that only the validation split may have, and of those that only the test split may have."""
BLOCK = 8192
MAX_BLOCKS_WITHOUT_NEWS = 16


class Arithmetic(PromptDataModule):
    """Several operations in a row, with one step of working each and the answer after ``#``.

    =============  ===================================================  =================  ==========================
    kind           a step computes                                      prompt             demonstration
    =============  ===================================================  =================  ==========================
    ``modular``    the remainder by `modulus`                           ``7+5-8=``         ``7+5=2,2-8=4#4``
    ``integer``    the integer, which may be negative                   ``7+5-18=``        ``7+5=12,12-18=-6#-6``
    ``bounded``    the integer, never outside 0 .. `max_value`          ``37+8-9=``        ``37+8=45,45-9=36#36``
    ``brackets``   the innermost bracket                                ``(3+4)*2=``       ``3+4=7,7*2=14#14``
    =============  ===================================================  =================  ==========================

    The first three go from left to right. The splits are disjoint by construction: a hash of the problem's text alone
    says which split it belongs to, whatever the seed and the sizes, so that a policy that another run has trained on
    this data has not seen the held-out problems either. The n-th problem of a split does not depend on any size.

    Args:
        kind: What a step computes.
        num_terms: Most numbers of a problem, >= 2: the level of the task. A problem of n numbers takes n - 1 steps.
        min_terms: Fewest numbers of a problem, >= 2; null for `num_terms`.
        max_term: Largest number.
        min_term: Smallest number, >= 0.
        first_term: Smallest and largest first number; null for those of the other numbers.
        modulus: Of ``kind: modular``, >= 2; null for 10.
        max_value: Of ``kind: bounded``; null for 99.
        operators: Drawn from, some of ``+-*``; null for all that the kind knows.
        working: How demonstrations are written: ``steps`` as above; ``chained`` (not for brackets) does not repeat the
            running value, ``7+5=2-8=4#4``; ``totals`` has the results alone, ``2,4#4``.
        terse_share: Share of the demonstrations that have the answer alone, ``#4``, in [0, 1].
        terse_rounding: The answers that stand alone are estimates: rounded to a multiple of this, >= 1; 1 for exact.
        num_train: Training problems.
        num_validation: Held-out problems for `validate`.
        num_test: Held-out problems for `test`.
        num_demonstrations: Worked training problems for the cold start.
        seed: Of the problems.
        evaluation_batch_size: Held-out problems completed at once, over all ranks.

    Raises:
        ConfigurationError: A setting is out of its range or of another kind, or there are too few different problems.
    """

    def __init__(
        self,
        kind: Kind = "modular",
        num_terms: int = 5,
        min_terms: int | None = None,
        max_term: int = 9,
        min_term: int = 0,
        first_term: tuple[int, int] | None = None,
        modulus: int | None = None,
        max_value: int | None = None,
        operators: str | None = None,
        working: Working = "steps",
        terse_share: float = 0.0,
        terse_rounding: int = 1,
        num_train: int = 20_000,
        num_validation: int = 512,
        num_test: int = 2_048,
        num_demonstrations: int = 20_000,
        seed: int = 0,
        evaluation_batch_size: int = 512,
    ) -> None:
        super().__init__(seed=seed, evaluation_batch_size=evaluation_batch_size)
        require(kind in OPERATORS, "kind", f"one of {', '.join(OPERATORS)}", repr(kind))
        self.kind, self.num_terms, self.min_terms = kind, num_terms, num_terms if min_terms is None else min_terms
        self.term = (min_term, max_term)
        self.first_term = self.term if first_term is None else tuple(first_term)
        self.modulus = _of_kind("modular", kind, "modulus", modulus, 10)
        self.max_value = _of_kind("bounded", kind, "max_value", max_value, 99)
        self.operators = OPERATORS[kind] if operators is None else operators
        self.working, self.terse_share, self.terse_rounding = working, terse_share, terse_rounding
        self.sizes: dict[Split, int] = {"train": num_train, "validation": num_validation, "test": num_test}
        self.num_demonstrations = num_demonstrations
        self._problems: dict[Split, list[Problem]] = {}
        self._check_level()
        self._check_sizes()

    def rows(self, split: Split) -> Sequence[Row]:
        """Prompt and answer of each problem of a split."""
        return [_row(problem) for problem in self._drawn(split)[: self.sizes[split]]]

    def demonstration_rows(self) -> Sequence[Row]:
        """Training problems with their working, or with an estimate of the answer alone."""
        problems = self._drawn("train")[: self.num_demonstrations]
        numbers = torch.arange(len(problems))
        zeros = torch.zeros_like(numbers)
        chances = uniforms(
            seed=self.seed, stream=Stream.DATA, iteration=0, slots=numbers, samples=zeros + 1, positions=zeros
        )
        rows = []
        for problem, chance in zip(problems, chances.tolist(), strict=True):
            if chance < self.terse_share:
                demonstration = f"#{rounded(int(problem.answer), self.terse_rounding)}"
            else:
                demonstration = f"{write_working(problem, self.working)}#{problem.answer}"
            rows.append({**_row(problem), "demonstration": demonstration})
        return rows

    def _drawn(self, split: Split) -> list[Problem]:
        if not self._problems:
            self._problems = self._draw()
        return self._problems[split]

    def _draw(self) -> dict[Split, list[Problem]]:
        """Different problems, in the order in which they are drawn, until every split has its number."""
        wanted: dict[Split, int] = {**self.sizes, "train": max(self.sizes["train"], self.num_demonstrations)}
        problems: dict[Split, list[Problem]] = {split: [] for split in wanted}
        seen: set[str] = set()
        block = last_news = 0
        while any(len(problems[split]) < number for split, number in wanted.items()):
            if block - last_news > MAX_BLOCKS_WITHOUT_NEWS:
                self._refuse_sizes(problems)
            for problem in self._block(block):
                split = home(problem.text)
                if problem.text not in seen and len(problems[split]) < wanted[split]:
                    seen.add(problem.text)
                    problems[split].append(problem)
                    last_news = block
            block += 1
        return problems

    def _block(self, block: int) -> Iterator[Problem]:
        """Some problems; every number in them is a function of seed, block, problem and place."""
        n = self.num_terms
        drawn = uniforms(
            seed=self.seed,
            stream=Stream.DATA,
            iteration=block,
            slots=torch.arange(BLOCK)[:, None],
            samples=torch.zeros(1, 1, dtype=torch.long),
            positions=torch.arange(3 * n - 1)[None],
        )
        lengths = _in_range(drawn[:, 0], self.min_terms, n).tolist()
        terms = torch.cat([_in_range(drawn[:, 1:2], *self.first_term), _in_range(drawn[:, 2 : n + 1], *self.term)], 1)
        signs = _in_range(drawn[:, n + 1 : 2 * n], 0, len(self.operators) - 1).tolist()
        cuts = drawn[:, 2 * n :].tolist()
        rule = self._rule()
        for length, numbers, indices, cut in zip(lengths, terms.tolist(), signs, cuts, strict=True):
            operators = [self.operators[i] for i in indices[: length - 1]]
            if rule is None:
                yield bracketed(numbers[:length], operators, cut)
            else:
                yield chain(numbers[:length], operators, rule)

    def _rule(self) -> Rule | None:
        rules = {"modular": modular(self.modulus), "integer": integer, "bounded": bounded(self.max_value)}
        return rules.get(self.kind)

    def _check_level(self) -> None:
        least, greatest = self.term
        require(self.num_terms >= 2, "num_terms", ">= 2", self.num_terms)
        require(2 <= self.min_terms <= self.num_terms, "min_terms", f"in 2 .. {self.num_terms}", self.min_terms)
        require(least >= 0, "min_term", ">= 0", least)
        require(least < greatest, "max_term", f"> data.min_term ({least})", greatest)
        first = self.first_term
        require(0 <= first[0] <= first[1], "first_term", "[least, greatest] with 0 <= least <= greatest", list(first))
        require(self.modulus >= 2, "modulus", ">= 2", self.modulus)
        known = OPERATORS[self.kind]
        fits = 0 < len(self.operators) == len(set(self.operators)) and set(self.operators) <= set(known)
        require(fits, "operators", f"some of {known!r} with kind {self.kind}, each once", repr(self.operators))
        require(0 <= self.terse_share <= 1, "terse_share", "in [0, 1]", self.terse_share)
        require(
            self.working in get_args(Working), "working", f"one of {', '.join(get_args(Working))}", repr(self.working)
        )
        require(self.terse_rounding >= 1, "terse_rounding", ">= 1", self.terse_rounding)
        is_chain = self.working != "chained" or self.kind != "brackets"
        require(is_chain, "working", "'steps' or 'totals' with kind brackets", repr(self.working))
        if self.kind == "bounded":
            # A number that fits neither below nor above the running value would leave no operation to choose.
            room = max(2 * greatest - 1, first[1])
            require(self.max_value >= room, "max_value", f">= {room} with these terms", self.max_value)
            require(set(self.operators) == set("+-"), "operators", "'+-' with kind bounded", repr(self.operators))

    def _check_sizes(self) -> None:
        for split, number in self.sizes.items():
            require(number >= 0, f"num_{split}", ">= 0", number)
        require(self.num_demonstrations >= 0, "num_demonstrations", ">= 0", self.num_demonstrations)

    def _refuse_sizes(self, problems: dict[Split, list[Problem]]) -> None:
        """Every problem that the settings allow has been drawn, as far as one can tell, and it is too few."""
        for split, number in self.sizes.items():
            found = len(problems[split])
            name = "num_demonstrations" if split == "train" and found >= number else f"num_{split}"
            if found < max(number, self.num_demonstrations if split == "train" else 0):
                raise ConfigurationError(
                    f"data.{name}: this level has only {found} different problems for the {split} split, which gets "
                    f"{HELD_OUT_SHARE if split != 'train' else 1 - 2 * HELD_OUT_SHARE:.0%} of them.\n"
                    "Ask for fewer, or raise data.num_terms or data.max_term."
                )


def home(text: str) -> Split:
    """The split that a problem belongs to, by its text alone."""
    share = int.from_bytes(sha256(text.encode()).digest()[:4], "big") / 2**32
    if share < HELD_OUT_SHARE:
        return "validation"
    return "test" if share < 2 * HELD_OUT_SHARE else "train"


def _row(problem: Problem) -> dict[str, Any]:
    return {"prompt": f"{problem.text}=", "answer": problem.answer}


def _in_range(uniform: torch.Tensor, least: int, greatest: int) -> torch.Tensor:
    """Whole numbers from `least` to `greatest`, both included."""
    return least + (uniform * (greatest - least + 1)).long()


def _of_kind(owner: Kind, kind: Kind, name: str, value: int | None, default: int) -> int:
    """A setting that one kind alone has: refused, rather than ignored, with any other."""
    require(value is None or kind == owner, name, f"null with kind {kind}: it belongs to kind {owner}", value)
    return default if value is None else value
