"""Settings of the command lines, checked before anything is measured."""

import subprocess
from argparse import ArgumentTypeError
from pathlib import Path


def positive(text: str) -> int:
    """A number of rounds, steps or threads.

    Raises:
        ArgumentTypeError: It is none, or less than one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def folder(text: str) -> Path:
    """A folder, which is made.

    Raises:
        ArgumentTypeError: It cannot be.
    """
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"{text} cannot be made: {error.strerror}") from error
    return Path(text)


def python_with_trl(text: str) -> str:
    """An interpreter of an environment that has TRL.

    Raises:
        ArgumentTypeError: It does not run, or has none.
    """
    has_trl = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    try:
        subprocess.run([text, "-c", has_trl], check=True, capture_output=True)
    except OSError as error:
        raise ArgumentTypeError(f"{text} does not run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise ArgumentTypeError(f"{text} has no TRL; `make .venv-peers/installed` makes one that has") from error
    return text
