"""The verdict of a reasoning-gym verifier on one answer, as a worker process gives it.

The worker loads this file by itself, without the package around it: that keeps the process small and quick to start.
"""

import pickle
from functools import cache
from typing import Any


def verify_answer(*, entry: dict[str, Any], task: str, task_config: dict[str, Any], answer: str | None) -> list[float]:
    """What the task's own verifier gives for an answer.

    A verifier that raises cannot read the answer, which is then worth 0, provided that it reads the true answer of the
    same task; otherwise the verifier is broken, and its exception stands.

    Args:
        entry: The task as reasoning-gym made it: ``question``, ``answer`` and ``metadata``.
        task: The generator's name.
        task_config: Its settings, on which some verifiers depend.
        answer: What the completion answers; None where it does not.

    Returns:
        One score, in [0, 1].
    """
    verifier = _verifier(task, pickle.dumps(task_config))
    try:
        return [float(verifier.score_answer(answer, entry))]
    except Exception:
        verifier.score_answer(entry["answer"], entry)
        return [0.0]


@cache
def _verifier(task: str, pickled_config: bytes) -> Any:
    """The task's generator, whose content does not matter here; pickled, because a cache needs what can be hashed."""
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=0, size=1, **pickle.loads(pickled_config))
