import pytest

from grpo_lightning.checkpointing import problem_of
from grpo_lightning.checkpointing.manifest import IN_FOLDER, content_of, write_manifest
from grpo_lightning.checkpointing.writing import write_file

FILES = ["rest.pt", "__0_0.distcp", "__1_0.distcp", ".metadata"]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of four files."""
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(bytes(range(100 + number)))
    write_manifest(folder / IN_FOLDER, {name: [content_of(folder / name)] for name in FILES})
    return folder


@pytest.fixture
def file(tmp_path):
    """A checkpoint of one file."""
    write_file({"weights": list(range(100))}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_what_is_whole_has_no_problem(folder):
    assert problem_of(folder) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert problem_of(folder, with_checksums=False) == f"{folder / name} is missing."


def test_a_file_that_was_cut_off_is_named_with_its_sizes(folder):
    (folder / "__1_0.distcp").write_bytes(bytes(7))
    expected = f"{folder}/__1_0.distcp is torn: it has 7 bytes, and was written with 102."
    assert problem_of(folder, with_checksums=False) == expected


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_by_the_rank_that_reads_the_file(folder, name):
    flip(folder / name, 50)
    assert f"{folder / name} is damaged" in problem_of(folder)
    found = [problem_of(folder, rank=rank, num_ranks=3) for rank in range(3)]
    assert sum(problem is not None for problem in found) == 1


def test_every_bit_of_a_file_counts(file):
    for position in range(file.stat().st_size):
        flip(file, position)
        assert problem_of(file) is not None, position
        flip(file, position)
    assert problem_of(file) is None


def test_a_manifest_without_its_last_part_is_damaged(file):
    manifest = file.with_name("last.ckpt.manifest.json")
    manifest.write_text(manifest.read_text()[:-10])
    assert problem_of(file) == f"{manifest} is damaged: it is not what a manifest looks like."


@pytest.mark.parametrize("listed", [[], ["another.ckpt"]])
def test_a_manifest_that_does_not_name_the_file_is_damaged(file, listed):
    write_file(1, file.with_name("another.ckpt"))
    manifest = file.with_name("last.ckpt.manifest.json")
    write_manifest(manifest, {name: [content_of(file.with_name(name))] for name in listed})
    expected = f"{manifest} is damaged: it does not say what last.ckpt holds."
    assert problem_of(file, with_checksums=False) == expected


def test_a_manifest_that_names_no_files_of_a_folder_is_damaged(folder):
    write_manifest(folder / IN_FOLDER, {})
    expected = f"{folder / IN_FOLDER} is damaged: it does not say what last.ckpt holds."
    assert problem_of(folder, with_checksums=False) == expected


def test_a_file_without_a_manifest_is_taken_unless_its_end_is_missing(file):
    file.with_name("last.ckpt.manifest.json").unlink()
    assert problem_of(file) is None
    file.write_bytes(file.read_bytes()[:-30])
    assert "last.ckpt is torn" in problem_of(file)


def test_a_folder_without_a_manifest_is_torn(folder):
    (folder / IN_FOLDER).unlink()
    assert problem_of(folder) == f"{folder} is torn: it has no manifest.json, which is written last."
