"""The part of a page that a command writes."""

END = "<!-- end -->"


def begin(command: str) -> str:
    """The mark before what a command writes."""
    return f"<!-- what {command} writes -->"


def with_part(page: str, command: str, text: str) -> str:
    """A page with another text between a command's marks.

    Args:
        page: In Markdown, with both marks.
        command: As it stands in the first mark.
        text: What it writes.

    Raises:
        ValueError: The page has no such marks.
    """
    before, rest = page.split(begin(command))
    _, after = rest.split(END, maxsplit=1)
    return f"{before}{begin(command)}\n\n{text}\n\n{END}{after}"
