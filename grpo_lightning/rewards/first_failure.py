"""A traceback in two lines: what went wrong, and where in its user's own file."""

import re
from pathlib import Path

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$')
_PACKAGE = str(Path(__file__).parents[1])
_OF_OTHERS = ("site-packages", "dist-packages", "/lib/python", "<frozen", _PACKAGE)


def summarize(failure: str) -> str:
    """Say in two lines what a traceback says in thirty.

    Args:
        failure: The text of a traceback, or any other text.

    Returns:
        The error and the last place in a file that belongs to no installed package (the last of all where every one
        does); of a text without a traceback, the first two lines.
    """
    lines = failure.strip().splitlines()
    frames = [(number, frame) for number, line in enumerate(lines) if (frame := _FRAME.match(line))]
    if not frames:
        return "\n".join(lines[:2])
    error = next((line for line in lines[frames[-1][0] :] if not line.startswith(" ")), lines[-1])
    own = [frame for _, frame in frames if not any(part in frame["file"] for part in _OF_OTHERS)]
    last = own[-1] if own else frames[-1][1]
    return f"{error[:300]}\n{last['file']}, line {last['line']}, in {last['name']}"
