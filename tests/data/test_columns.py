import pytest

from grpo_lightning.data.columns import ColumnDataModule, split_off
from grpo_lightning.data.encoding import PlacedRow
from grpo_lightning.functional.random import permutation
from grpo_lightning.types import ConfigurationError, Stream


class Given(ColumnDataModule):
    """Rows that are given, and how often they were asked for."""

    def __init__(self, train, validation=None, test=None, **settings):
        super().__init__(**settings)
        self.given = {"train": train, "validation": validation, "test": test}
        self.loads = []

    def load(self, split):
        self.loads.append(split)
        rows = self.given[split]
        return rows and [PlacedRow(row, place=f"{split}:{i}") for i, row in enumerate(rows, start=1)]


ROWS = [{"prompt": str(i), "solution": f"so {i} #### {i}"} for i in range(10)]


def refuse(*args, **settings):
    with pytest.raises(ConfigurationError) as error:
        Given(*args, **settings).rows("train")
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_a_new_column_copies_another_and_leaves_it():
    (row,) = Given(ROWS[:1], columns={"answer": "solution"}).rows("train")
    assert row == {"prompt": "0", "solution": "so 0 #### 0", "answer": "so 0 #### 0"}


def test_one_column_can_be_the_answer_and_the_demonstration():
    data = Given(ROWS, columns={"answer": "solution", "demonstration": "solution"}, answer_pattern="#### (.+)")
    (row, *_) = data.demonstration_rows()
    assert (row["answer"], row["demonstration"]) == ("0", "so 0 #### 0")


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("6 + 6 = 12\n#### 12", "#### (.+)", "12"),
        ("6 + 6 = 12\n####  1,200 \n", "#### (.+)", "1,200"),
        ("the answer is (C).", r"\(([A-D])\)", "C"),
        (12, r"(\d+)", "12"),
    ],
)
def test_the_pattern_finds_the_answer_within_the_column(text, pattern, answer):
    (row,) = Given([{"prompt": "?", "answer": text}], answer_pattern=pattern).rows("train")
    assert row["answer"] == answer


def test_an_answer_that_the_pattern_does_not_find_is_named():
    message = refuse(
        [{"prompt": "?", "answer": "#### 1"}, {"prompt": "?", "answer": "two"}], answer_pattern="#### (.+)"
    )
    assert message == "train:2: data.answer_pattern '#### (.+)' finds nothing in the answer 'two'."


@pytest.mark.parametrize("pattern", ["####", "(a)(b)", "(", ""])
def test_a_pattern_that_has_not_one_group_is_refused_when_the_object_is_built(pattern):
    with pytest.raises(ConfigurationError, match=r"data\.answer_pattern"):
        Given(ROWS, answer_pattern=pattern)


def test_a_missing_column_is_named_with_its_row_and_its_setting():
    rows = [{"prompt": "?", "answer": "1"}, {"prompt": "?"}]
    there = "it has: prompt."
    assert refuse(rows, columns={"solution": "answer"}) == (
        f"train:2 has no column 'answer' (data.columns.solution); {there}"
    )
    assert refuse(rows, answer_pattern="(.)") == f"train:2 has no column 'answer' (data.answer_pattern); {there}"
    assert refuse(rows, prompt_column="question") == (
        "train:1 has no column 'question' (data.prompt_column); it has: prompt, answer."
    )


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_the_prompt_has_one_setting(name):
    with pytest.raises(ConfigurationError, match=r"named by data\.prompt_column"):
        Given(ROWS, columns={name: "solution"}, prompt_column="question")


def test_rows_are_split_off_as_the_permutation_says():
    held_out = sorted(permutation(10, seed=5, stream=Stream.DATA, epoch=0).tolist()[:3])
    data = Given(ROWS, validation_size=3, seed=5)
    assert [row["prompt"] for row in data.rows("validation")] == [str(i) for i in held_out]
    assert [row["prompt"] for row in data.rows("train")] == [str(i) for i in range(10) if i not in held_out]
    assert data.rows("test") == []


def test_a_place_survives_the_split():
    train, held_out = split_off([PlacedRow(row, place=row["prompt"]) for row in ROWS], 4, seed=0)
    assert all(row.place == row["prompt"] for row in (*train, *held_out))


def test_rows_of_one_prompt_on_both_sides_of_the_split_are_refused(tokenizer):
    data = Given([{"prompt": "same"}] * 4, validation_size=1)
    with pytest.raises(ConfigurationError, match="data: 1 of 1 prompts of the validation split are trained on too"):
        data.encode(tokenizer)


@pytest.mark.parametrize("size", [10, 11])
def test_something_must_be_left_to_train_on(size):
    assert refuse(ROWS, validation_size=size) == (
        f"data.validation_size must be less than the 10 training rows, got {size}."
    )


def test_a_validation_size_beside_validation_rows_is_not_ignored():
    assert refuse(ROWS, ROWS[:1], validation_size=3) == (
        "data.validation_size must be 0 beside validation rows, got 3."
    )


def test_a_negative_validation_size_is_refused():
    with pytest.raises(ConfigurationError, match=r"data\.validation_size must be >= 0, got -1"):
        Given(ROWS, validation_size=-1)


def test_splits_that_are_given_are_taken():
    data = Given(ROWS[:2], ROWS[2:5], ROWS[5:6])
    assert [len(data.rows(split)) for split in ("train", "validation", "test")] == [2, 3, 1]


def test_a_split_is_loaded_once(tokenizer):
    data = Given(ROWS, validation_size=2, columns={"demonstration": "solution"})
    data.encode(tokenizer)
    data.demonstrations(tokenizer)
    assert sorted(data.loads) == ["test", "train", "validation"]


def test_demonstrations_need_their_column():
    with pytest.raises(ConfigurationError, match=r"data.columns: \{demonstration: ...\}"):
        Given(ROWS).demonstration_rows()
