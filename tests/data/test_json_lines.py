import json

import pytest

from grpo_lightning.data import JSONLines
from grpo_lightning.types import ConfigurationError

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows, or bytes, to a file of the current folder, and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(content, name="train.jsonl"):
        lines = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content).encode()
        (tmp_path / name).write_bytes(lines)
        return name

    return write


def refuse(path, **settings):
    with pytest.raises(ConfigurationError) as error:
        JSONLines(path, **settings).rows("train")
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_every_line_is_a_row_that_knows_its_place(write):
    rows = JSONLines(write(ROWS)).rows("train")
    assert rows == ROWS
    assert [row.place for row in rows] == [f"train.jsonl:{n}" for n in range(1, 7)]


def test_each_split_has_its_file(write):
    data = JSONLines(write(ROWS[:3]), write(ROWS[3:5], "held_out.jsonl"), write(ROWS[5:], "test.jsonl"))
    assert [data.rows(split) for split in ("train", "validation", "test")] == [ROWS[:3], ROWS[3:5], ROWS[5:]]


def test_without_a_file_of_their_own_held_out_rows_are_split_off_and_no_row_is_lost(write):
    data = JSONLines(write(ROWS), validation_size=2)
    train, held_out = data.rows("train"), data.rows("validation")
    assert (len(train), len(held_out), data.rows("test")) == (4, 2, [])
    assert sorted((*train, *held_out), key=lambda row: row["prompt"]) == ROWS


def test_blank_lines_are_passed_over_and_counted(write):
    rows = JSONLines(write(b'\n{"prompt": "a"}\n   \n{"prompt": "b"}')).rows("train")
    assert [(row["prompt"], row.place) for row in rows] == [("a", "train.jsonl:2"), ("b", "train.jsonl:4")]


@pytest.mark.parametrize(
    "text", ["日本 é €", "line\u2028separator", "next\u0085line", "form\x0cfeed", "two\nlines"], ids=ascii
)
def test_a_row_is_a_line_whatever_characters_are_in_it(write, text):
    # Left as they are where JSON allows it, all but \x0c and \n: what a reader might take for the end of a line.
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    rows = JSONLines(write(f"{line}\n{line}\n".encode())).rows("train")
    assert [row["prompt"] for row in rows] == [text, text]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_files_of_other_editors_are_read(write, newline):
    rows = JSONLines(write(b'\xef\xbb\xbf{"prompt": "a"}' + newline + b'{"prompt": "b"}' + newline)).rows("train")
    assert [row["prompt"] for row in rows] == ["a", "b"]


def test_a_path_may_begin_at_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(ROWS)
    assert JSONLines("~/train.jsonl").rows("train") == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.train_path: the file 'train.jsonl' is empty."),
        (b"\n \n", "data.train_path: the file 'train.jsonl' is empty."),
        (b'{"prompt": "a"}\n{"prompt": \n', "train.jsonl:2 is not JSON: Expecting value (column 11)."),
        (b'{"prompt": "a"}\n["a"]\n', "train.jsonl:2 must be a JSON object, got '[\"a\"]'."),
        (b'"' + b"a" * 100 + b'"', f"train.jsonl:1 must be a JSON object, got '\"{'a' * 79}'."),
        (
            b'{"prompt": "caf\xe9"}',
            "data.train_path: the file 'train.jsonl' is no UTF-8 text: invalid continuation byte.",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named_with_its_line(write, content, message):
    assert refuse(write(content)) == message


def test_a_missing_file_and_a_folder_are_named_with_their_setting(write, tmp_path):
    (tmp_path / "folder").mkdir()
    assert refuse("absent.jsonl") == "data.train_path: the file 'absent.jsonl' does not exist."
    assert refuse("folder") == "data.train_path: the file 'folder' is a folder."
    assert refuse(write(ROWS), validation_path="absent.jsonl") == (
        "data.validation_path: the file 'absent.jsonl' does not exist."
    )


def test_the_seventeenth_line_is_named_when_its_row_lacks_the_prompt(write, tokenizer):
    rows = [{"question": str(i)} for i in range(20)]
    rows[16] = {"prompt": "?"}
    assert refuse(write(rows), prompt_column="question") == (
        "train.jsonl:17 has no column 'question' (data.prompt_column); it has: prompt."
    )
