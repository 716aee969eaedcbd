import pytest

from tools.marked import END, begin, with_part

PAGE = f"# Two\n\n{begin('a')}\n\nold\n\n{END}\n\n{begin('b')}\n\nother\n\n{END}\n"


def test_what_a_command_writes_goes_between_its_marks_again_and_again():
    once = with_part(PAGE, "a", "| new |")
    assert once == PAGE.replace("old", "| new |")
    assert with_part(once, "a", "old") == PAGE
    assert with_part(PAGE, "b", "new") == PAGE.replace("other", "new")


def test_a_page_without_the_marks_is_an_error():
    with pytest.raises(ValueError, match="not enough values"):
        with_part(PAGE, "c", "new")
