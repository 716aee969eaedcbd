"""What a collective says whose ranks did not all come, in words that say what to do."""

import re
from typing import Any

_IN_VAIN = re.compile(r"timed out|timeout", re.IGNORECASE)


def explained(exception: BaseException, strategy: Any) -> BaseException:
    """The exception, or one that says that this rank has waited in vain for another.

    Args:
        exception: That ended the run. Where it is of a collective, its traceback ends with the same words.
        strategy: The Trainer's.
    """
    if not isinstance(exception, RuntimeError) or not _IN_VAIN.search(str(exception)):
        return exception
    seconds = getattr(strategy, "timeout_seconds", None)
    limit = "" if seconds is None else f" within trainer.strategy.timeout_seconds = {seconds:g}"
    words = (
        f"another rank hangs: it did not answer in a collective{limit}. Look at what it was doing; "
        "where it was only slow, set a longer time."
    )
    exception.add_note(f"error: {words}")
    return TimeoutError(words)
