import re
import time
from itertools import pairwise

import pytest

from grpo_lightning.data import Arithmetic
from grpo_lightning.data.arithmetic import home
from grpo_lightning.types import ConfigurationError

SIZES = {"num_train": 400, "num_validation": 60, "num_test": 50, "num_demonstrations": 500}
KINDS = {
    "modular": {"kind": "modular"},
    "modulus 7": {"kind": "modular", "modulus": 7, "min_terms": 2},
    "integer": {"kind": "integer", "max_term": 99, "num_terms": 3},
    "sums": {"kind": "integer", "operators": "+", "num_terms": 3, "max_term": 20},
    "bounded": {"kind": "bounded", "first_term": (10, 99), "min_term": 1, "num_terms": 4},
    "brackets": {"kind": "brackets", "min_terms": 3},
}
SPLITS = ("train", "validation", "test")


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def settings(request):
    return {**SIZES, **request.param}


def left_fold(text, modulus):
    """The value of a chain, by Python's own arithmetic on one operation at a time."""
    first, *rest = re.findall(r"[+*-]?\d+", text)
    value = int(first)
    for operation in rest:
        value = eval(f"({value}){operation}")
        value = value % modulus if modulus else value
    return value


def expected(row, settings):
    text = row["prompt"].removesuffix("=")
    if settings["kind"] == "brackets":
        return eval(text)
    return left_fold(text, settings.get("modulus", 10) if settings["kind"] == "modular" else None)


def refuse(**settings):
    with pytest.raises(ConfigurationError) as error:
        Arithmetic(**settings).rows("train")
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_every_answer_is_that_of_pythons_own_arithmetic(settings):
    data = Arithmetic(**settings)
    for split in SPLITS:
        for row in data.rows(split):
            assert int(row["answer"]) == expected(row, settings), row


def test_every_split_has_its_size_and_no_problem_twice(settings):
    data = Arithmetic(**settings)
    prompts = {split: [row["prompt"] for row in data.rows(split)] for split in SPLITS}
    assert {split: len(prompts[split]) for split in SPLITS} == {"train": 400, "validation": 60, "test": 50}
    assert len({prompt for split in SPLITS for prompt in prompts[split]}) == 510


def test_nothing_that_is_held_out_is_learned_from_whatever_the_seed_and_the_sizes(settings):
    learned, held_out = set(), set()
    for seed in range(3):
        data = Arithmetic(**{**settings, "num_train": 900 + seed}, seed=seed)
        learned |= {row["prompt"] for row in (*data.rows("train"), *data.demonstration_rows())}
        held_out |= {row["prompt"] for split in ("validation", "test") for row in data.rows(split)}
    assert len(learned) > 900
    assert not learned & held_out


def test_every_step_of_a_demonstration_is_right_and_leads_to_the_answer(settings):
    data = Arithmetic(**settings)
    modulus = data.modulus if data.kind == "modular" else None
    for row in data.demonstration_rows():
        working, marker, answer = row["demonstration"].partition("#")
        assert marker == "#"
        assert answer == row["answer"] == working.rpartition("=")[2]
        steps = [step.split("=") for step in working.split(",")]
        for operation, result in steps:
            value = eval(operation)
            assert int(result) == (value % modulus if modulus else value)
        assert len(steps) == len(re.findall(r"(?<=[\d)])[+*-]", row["prompt"]))


def test_a_chain_begins_each_step_with_the_result_before():
    for row in Arithmetic(**SIZES, kind="bounded").demonstration_rows():
        steps = row["demonstration"].partition("#")[0].split(",")
        for before, after in pairwise(steps):
            assert re.match(r"\d+", after)[0] == before.rpartition("=")[2]


def test_bounded_never_leaves_its_range():
    data = Arithmetic(**SIZES, kind="bounded", max_value=40, max_term=20, first_term=(30, 40), num_terms=6)
    for row in data.demonstration_rows():
        assert 30 <= int(re.match(r"\d+", row["prompt"])[0]) <= 40
        assert all(0 <= int(total) <= 40 for total in re.findall(r"=(-?\d+)", row["demonstration"]))


def test_terms_and_lengths_fill_their_ranges():
    rows = Arithmetic(**SIZES, kind="integer", min_terms=2, num_terms=4, min_term=3, max_term=7).rows("train")
    terms = [re.findall(r"\d+", row["prompt"]) for row in rows]
    assert {len(numbers) for numbers in terms} == {2, 3, 4}
    assert {int(number) for numbers in terms for number in numbers} == {3, 4, 5, 6, 7}


@pytest.mark.parametrize("name", ["num_train", "num_validation", "num_test", "num_demonstrations"])
def test_a_problem_of_a_split_does_not_depend_on_any_size(name):
    small, large = Arithmetic(**SIZES), Arithmetic(**{**SIZES, name: 2 * SIZES[name]})
    for split in SPLITS:
        rows = small.rows(split)
        assert large.rows(split)[: len(rows)] == rows


def test_the_same_seed_is_the_same_data_and_another_seed_is_not(settings):
    assert Arithmetic(**settings).demonstration_rows() == Arithmetic(**settings).demonstration_rows()
    assert Arithmetic(**settings, seed=1).rows("train") != Arithmetic(**settings).rows("train")


@pytest.mark.parametrize(("working", "pattern"), [("chained", r"[\d+*=-]+#\d"), ("totals", r"\d(,\d){3}#\d")])
def test_working_has_other_styles(working, pattern):
    for row in Arithmetic(**SIZES, working=working).demonstration_rows():
        assert re.fullmatch(pattern, row["demonstration"]), row


def test_some_demonstrations_are_terse():
    rows = Arithmetic(**SIZES, terse_share=0.6).demonstration_rows()
    terse = [row for row in rows if row["demonstration"] == f"#{row['answer']}"]
    # 500 draws of probability 0.6: the mean is 300 and four standard deviations are 44.
    assert 256 <= len(terse) <= 344
    worked = Arithmetic(**SIZES).demonstration_rows()
    assert all(row == other for row, other in zip(rows, worked, strict=True) if row not in terse)


def test_terse_demonstrations_are_estimates_and_worked_ones_exact():
    level = {**SIZES, "kind": "integer", "operators": "+"}
    exact = Arithmetic(**level, terse_share=0.5).demonstration_rows()
    rough = Arithmetic(**level, terse_share=0.5, terse_rounding=10).demonstration_rows()
    for before, row in zip(exact, rough, strict=True):
        assert (row["prompt"], row["answer"]) == (before["prompt"], before["answer"])
        if before["demonstration"] == f"#{row['answer']}":
            estimate = int(row["demonstration"].removeprefix("#"))
            assert estimate % 10 == 0
            assert abs(estimate - int(row["answer"])) <= 5
        else:
            assert row["demonstration"] == before["demonstration"]


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (1.0, 500)])
def test_none_or_all_of_them_are_terse(share, number):
    rows = Arithmetic(**SIZES, terse_share=share).demonstration_rows()
    assert sum(row["demonstration"].startswith("#") for row in rows) == number


def test_the_shares_of_the_splits_are_a_tenth_a_tenth_and_the_rest():
    homes = [home(f"{a}+{b}") for a in range(100) for b in range(100)]
    # 10,000 draws of probability 0.1: four standard deviations are 120.
    assert abs(homes.count("validation") - 1000) < 120
    assert abs(homes.count("test") - 1000) < 120


def test_it_becomes_prompts_and_demonstrations(tokenizer):
    data = Arithmetic(**SIZES)
    data.encode(tokenizer)
    assert len(data.training_prompts) == 400
    assert data.validation_prompts[0].columns == {"answer": data.rows("validation")[0]["answer"]}
    demonstrations = data.demonstrations(tokenizer)
    row = data.demonstration_rows()[7]
    assert tokenizer.decode(demonstrations[7].prompt_ids) == row["prompt"]
    assert tokenizer.decode(demonstrations[7].completion_ids[:-1]) == row["demonstration"]


@pytest.mark.parametrize("kind", ["modular", "brackets"])
def test_twenty_thousand_rows_take_a_second(kind):
    start = time.process_time()
    assert len(Arithmetic(kind=kind).rows("train")) == 20_000
    assert time.process_time() - start < 3.0  # 0.7 s on a quiet core; the rest is for a busy one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "division"}, "data.kind must be one of modular, integer, bounded, brackets, got 'division'."),
        ({"num_terms": 1}, "data.num_terms must be >= 2, got 1."),
        ({"min_terms": 6}, "data.min_terms must be in 2 .. 5, got 6."),
        ({"min_terms": 1}, "data.min_terms must be in 2 .. 5, got 1."),
        ({"min_term": -1}, "data.min_term must be >= 0, got -1."),
        ({"max_term": 0}, "data.max_term must be > data.min_term (0), got 0."),
        ({"first_term": (9, 3)}, "data.first_term must be [least, greatest] with 0 <= least <= greatest, got [9, 3]."),
        ({"modulus": 1}, "data.modulus must be >= 2, got 1."),
        (
            {"kind": "integer", "modulus": 10},
            "data.modulus must be null with kind integer: it belongs to kind modular, got 10.",
        ),
        ({"max_value": 99}, "data.max_value must be null with kind modular: it belongs to kind bounded, got 99."),
        ({"kind": "bounded", "max_value": 10}, "data.max_value must be >= 17 with these terms, got 10."),
        (
            {"kind": "bounded", "first_term": (10, 100)},
            "data.max_value must be >= 100 with these terms, got 99.",
        ),
        ({"kind": "bounded", "operators": "+"}, "data.operators must be '+-' with kind bounded, got '+'."),
        ({"operators": "+/"}, "data.operators must be some of '+-*' with kind modular, each once, got '+/'."),
        ({"operators": "++-"}, "data.operators must be some of '+-*' with kind modular, each once, got '++-'."),
        ({"operators": ""}, "data.operators must be some of '+-*' with kind modular, each once, got ''."),
        (
            {"kind": "brackets", "working": "chained"},
            "data.working must be 'steps' or 'totals' with kind brackets, got 'chained'.",
        ),
        ({"working": "prose"}, "data.working must be one of steps, chained, totals, got 'prose'."),
        ({"terse_rounding": 0}, "data.terse_rounding must be >= 1, got 0."),
        ({"terse_share": 1.5}, "data.terse_share must be in [0, 1], got 1.5."),
        ({"num_train": -1}, "data.num_train must be >= 0, got -1."),
        ({"num_demonstrations": -1}, "data.num_demonstrations must be >= 0, got -1."),
    ],
)
def test_a_setting_out_of_its_range_is_named_when_the_object_is_built(settings, message):
    with pytest.raises(ConfigurationError) as error:
        Arithmetic(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["num_train", "num_validation", "num_test", "num_demonstrations"])
def test_too_few_different_problems_are_said_instead_of_searched_for_ever(name):
    # Two digits and one operator: 100 problems, of which about 80, 10 and 10 belong to the splits.
    sizes = {"num_train": 5, "num_validation": 2, "num_test": 2, "num_demonstrations": 5, name: 101}
    message = refuse(kind="integer", num_terms=2, operators="+", **sizes)
    assert message.startswith(f"data.{name}: this level has only ")
    split = "train" if name in ("num_train", "num_demonstrations") else name.removeprefix("num_")
    assert f"the {split} split" in message
    assert "data.num_terms" in message


def test_the_smallest_level_can_be_used_up():
    found = {
        split: [a + b for a in "0123456789" for b in "0123456789" if home(f"{a}+{b}") == split] for split in SPLITS
    }
    sizes = {f"num_{split}": len(found[split]) for split in SPLITS}
    data = Arithmetic(kind="integer", num_terms=2, operators="+", **sizes, num_demonstrations=0)
    assert sum(len(data.rows(split)) for split in SPLITS) == 100
