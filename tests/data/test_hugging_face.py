import json

import pytest

datasets = pytest.importorskip("datasets")

from grpo_lightning.data import HuggingFaceDataset  # noqa: E402 - needs the extra
from grpo_lightning.types import ConfigurationError  # noqa: E402

ROWS = [{"question": f"{i}+1?", "answer": f"so {i + 1}\n#### {i + 1}"} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet_and_offline(tmp_path, monkeypatch):
    """No network, no progress bars, no cache outside the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def saved(tmp_path):
    """A data set with two splits, as `save_to_disk` writes it."""
    table = datasets.Dataset.from_list
    datasets.DatasetDict({"train": table(ROWS[:3]), "dev": table(ROWS[3:])}).save_to_disk("saved")
    return "saved"


@pytest.fixture
def one_split():
    """A single split, as `save_to_disk` writes it."""
    datasets.Dataset.from_list(ROWS).save_to_disk("one")
    return "one"


@pytest.fixture
def files(tmp_path):
    """A folder with a file of JSON lines for each split."""
    (tmp_path / "files").mkdir()
    for name, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        (tmp_path / "files" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "files"


def make(path, **settings):
    return HuggingFaceDataset(path, prompt_column="question", **settings)


def refuse(path, split="train", **settings):
    with pytest.raises(ConfigurationError) as error:
        make(path, **settings).rows(split)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_saved_splits_are_found_by_their_names(saved):
    data = make(saved, validation_split="dev")
    assert [data.rows(split) for split in ("train", "validation", "test")] == [ROWS[:3], ROWS[3:], []]
    assert data.rows("validation")[1].place == "saved dev row 1"


def test_a_folder_with_data_files_is_a_data_set(files):
    data = make(files, validation_split="test", answer_pattern="#### (.+)")
    assert [row["answer"] for row in data.rows("train")] == ["1", "2", "3"]
    assert [row["answer"] for row in data.rows("validation")] == ["4", "5"]


def test_a_single_saved_split_is_the_training_split(one_split):
    data = make(one_split, validation_size=2)
    assert (len(data.rows("train")), len(data.rows("validation"))) == (3, 2)
    assert refuse(one_split, "test", test_split="test") == (
        "data.path: the split 'test' (data.test_split) of 'one' cannot be loaded: the folder holds one split only, "
        "which is taken for data.train_split"
    )


def test_rows_become_prompts_with_their_other_columns(saved, tokenizer):
    data = make(saved, validation_split="dev", answer_pattern="#### (.+)")
    data.encode(tokenizer)
    assert [prompt.text for prompt in data.validation_prompts] == ["3+1?", "4+1?"]
    assert data.training_prompts[2].columns == {"answer": "3"}


def test_conversations_are_read_as_the_hub_stores_them(chat_tokenizer):
    messages = [{"role": "user", "content": "2+2?"}]
    datasets.Dataset.from_list([{"prompt": messages}]).save_to_disk("chat")
    data = HuggingFaceDataset("chat")
    data.encode(chat_tokenizer)
    assert chat_tokenizer.decode(data.training_prompts[0].token_ids) == "[user]2+2?\n[assistant]"


def test_an_absent_split_is_named_with_those_that_there_are(saved, files):
    assert refuse(saved, train_split="training") == (
        "data.path: the split 'training' (data.train_split) of 'saved' cannot be loaded: the folder holds the splits "
        "train, dev"
    )
    message = refuse(files, "validation", validation_split="dev")
    assert "the split 'dev' (data.validation_split) of 'files'" in message
    assert "['train', 'test']" in message


@pytest.mark.parametrize("path", ["./absent", "no-such-owner/no-such-data"])
def test_a_data_set_that_is_not_there_is_named(path):
    assert f"data.path: the split 'train' (data.train_split) of {path!r} cannot be loaded: " in refuse(path)


def test_a_broken_data_file_is_explained(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"question": "a"}\n{"question": ')
    assert "'broken' cannot be loaded: JSON parse error" in refuse("broken")


def test_an_empty_split_is_named():
    datasets.Dataset.from_list(ROWS).filter(lambda row: False).save_to_disk("none")
    assert refuse("none") == "data.train_split: the split 'train' of 'none' is empty."


@pytest.mark.parametrize("setting", ["configuration", "revision"])
def test_a_setting_that_a_saved_data_set_does_not_have_is_refused_not_ignored(saved, one_split, setting):
    for path in (saved, one_split):
        assert f"data.{setting} must be null" in refuse(path, **{setting: "main"})


def test_a_configuration_that_the_data_set_does_not_have_is_named(files):
    assert "BuilderConfig 'main' not found" in refuse(files, configuration="main")
