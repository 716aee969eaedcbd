import pytest

pytest.importorskip("reasoning_gym")

from grpo_lightning.data import ReasoningGym
from grpo_lightning.types import ConfigurationError

SIZES = {"num_train": 30, "num_validation": 8, "num_test": 5}
ONE_DIGIT = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
SPLITS = ("train", "validation", "test")


def make(**settings):
    return ReasoningGym(**{"task": "chain_sum", **SIZES, **settings})


def refuse(**settings):
    with pytest.raises(ConfigurationError) as error:
        make(**settings).rows("train")
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "word_sorting"])
def test_every_split_has_its_size_and_no_question_twice(task):
    data = make(task=task)
    questions = [row["question"] for split in SPLITS for row in data.rows(split)]
    assert [len(data.rows(split)) for split in SPLITS] == [30, 8, 5]
    assert len(set(questions)) == 43


def test_splits_stay_apart_where_the_generator_repeats_itself():
    # Ten digits are ten questions: the 40 tries that the generator is given repeat them.
    data = make(task_config=ONE_DIGIT, num_train=6, num_validation=2, num_test=2)
    questions = [row["question"] for split in SPLITS for row in data.rows(split)]
    assert len(set(questions)) == len(questions) == 10


def test_a_row_holds_what_its_verifier_needs():
    row = make(task_config={"max_terms": 3}).rows("train")[0]
    assert set(row) == {"prompt", "question", "answer", "metadata", "task", "task_config"}
    assert row["prompt"] == row["question"]
    assert (row["task"], row["task_config"]) == ("chain_sum", {"max_terms": 3})
    # The question is "State the final answer to ...: 4 + 3 =".
    assert int(row["answer"]) == eval(row["question"].partition(":")[2].removesuffix("="))


def test_more_training_tasks_leave_the_held_out_ones_as_they_are():
    small, large = make(), make(num_train=60)
    for split in ("validation", "test"):
        assert large.rows(split) == small.rows(split)
    assert large.rows("train")[:30] == small.rows("train")


def test_the_same_seed_is_the_same_data_and_another_seed_is_not():
    assert make(seed=1).rows("train") == make(seed=1).rows("train")
    assert make(seed=1).rows("train") != make(seed=2).rows("train")


def test_settings_of_the_task_reach_it():
    rows = make(task_config={"min_terms": 7, "max_terms": 7}).rows("train")
    assert {row["metadata"]["num_terms"] for row in rows} == {7}


def test_rows_become_prompts(tokenizer):
    data = make()
    data.encode(tokenizer)
    prompt = data.training_prompts[4]
    assert tokenizer.decode(prompt.token_ids) == prompt.text == data.rows("train")[4]["question"]
    assert prompt.columns["metadata"] == data.rows("train")[4]["metadata"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "chan_sum"}, "data.task: reasoning-gym has no task 'chan_sum'; did you mean chain_sum, "),
        ({"task": "xyz"}, "data.task: reasoning-gym has no task 'xyz'; it has ab, "),
        ({"task_config": {"min_terms": -1}}, "data.task_config: reasoning-gym's chain_sum refuses it: min_terms must"),
        ({"task_config": {"terms": 2}}, "data.task_config: reasoning-gym's chain_sum refuses it: ChainSumConfig"),
        (
            {"task_config": {"size": 9, "seed": 1}},
            "data.task_config must be without 'seed' and 'size', which follow from data, got ['seed', 'size'].",
        ),
        ({"num_train": -1}, "data.num_train must be >= 0, got -1."),
        ({"num_test": -1}, "data.num_test must be >= 0, got -1."),
    ],
)
def test_a_mistake_is_named_when_the_object_is_built(settings, message):
    with pytest.raises(ConfigurationError) as error:
        make(**settings)
    assert str(error.value).startswith(message)


def test_too_few_different_questions_are_said():
    assert refuse(task_config=ONE_DIGIT, num_train=20) == (
        "data: chain_sum made only 10 different questions of the 33 asked for.\n"
        "Lower data.num_train, or raise the level in data.task_config."
    )
