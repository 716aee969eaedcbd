"""The program of a worker process: it imports one function, then calls it with whatever it is sent.

The parent runs this file as a script and talks to it through its standard streams. It imports the standard library
alone: a worker is small and starts in a few tens of milliseconds, unless the function's own module is heavy.

Every message is a pickled `bytes` object that holds the pickled content. A content that does not unpickle spoils
its own message, never the stream.
"""

import asyncio
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

RETURNED, RAISED = "returned", "raised"
TAKEN = b"taken"


def main() -> None:
    """Serve calls until the parent closes the stream."""
    requests, replies = _take_over_streams()
    _end_with_parent()
    sys.path[:], module, file, qualname = pickle.loads(_take(requests, replies))
    try:
        function = load_function(module, file, qualname)
    except BaseException:
        _send(replies, pickle.dumps((RAISED, traceback.format_exc())))
        return
    _send(replies, pickle.dumps((RETURNED, None)))
    while True:
        try:
            payload = _take(requests, replies)
        except EOFError:
            return
        _send(replies, _call(function, payload))


def load_function(module: str, file: str | None, qualname: str) -> Callable[..., Any]:
    """Import a function by its module's name or, where that name cannot be imported here, from its file."""
    loaded: Any = _import_module(module, file)
    for attribute in qualname.split("."):
        loaded = getattr(loaded, attribute)
    if not callable(loaded):
        raise TypeError(f"{module}.{qualname} is not callable")
    return loaded  # type: ignore[no-any-return]  # callable() has just said so


def _import_module(name: str, file: str | None) -> ModuleType:
    """The module `name`, or the one in `file` (of a script, or of a test that no path leads to)."""
    if file is None or (name != "__main__" and _is_importable(name)):
        return importlib.import_module(name)
    alias = f"_worker_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(alias, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _call(function: Callable[..., Any], payload: bytes) -> bytes:
    """Call `function`, and answer with its value or the traceback, pickled."""
    try:
        args, kwargs = pickle.loads(payload)
        value = function(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        return pickle.dumps((RETURNED, value))
    except BaseException:  # sys.exit() in a reward is one failed completion too
        return pickle.dumps((RAISED, traceback.format_exc()))


def _take_over_streams() -> tuple[BinaryIO, BinaryIO]:
    """Keep the standard streams for the messages; what the function prints goes to the parent's standard error."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _end_with_parent() -> None:
    """End when the parent has died without closing us, also in the middle of an endless loop."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _take(requests: BinaryIO, replies: BinaryIO) -> bytes:
    """The next message, and word that it has arrived: from here on it is to blame if this process dies."""
    payload: bytes = pickle.load(requests)
    _send(replies, TAKEN)
    return payload


def _send(stream: BinaryIO, message: bytes) -> None:
    pickle.dump(message, stream)
    stream.flush()


if __name__ == "__main__":
    main()
