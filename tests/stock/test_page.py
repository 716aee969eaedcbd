"""`docs/lightning.md` has a row of each test that shows a part, and no other."""

from pathlib import Path

from stock import matrix


def test_every_test_of_a_part_has_its_row_and_every_row_its_test():
    shown = matrix.parts_of_tests()
    assert len(set(shown)) == len(shown)
    assert sorted(matrix.parts_of_page()) == sorted(shown)


def test_the_page_is_as_it_is_written():
    rows = [matrix.Row(*row) for row in _rows(matrix.PAGE.read_text())]
    assert matrix.page(rows) == matrix.PAGE.read_text()


def _rows(text):
    section = None
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| part "):
            yield (section, *line.removeprefix("| ").removesuffix(" |").split(" | "))


def test_the_page_is_found():
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "docs/lightning.md" in (Path(matrix.ROOT) / name).read_text()
