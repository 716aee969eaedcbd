"""The part of vLLM that runs a rank's share of an engine, on a CPU."""

from typing import Any
from uuid import uuid4

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from grpo_lightning.rollout.agreement import of_first_rank


class CPUExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]  # vLLM is not there where types are checked
    """As vLLM's own for the ranks of a run, with an address that no other run has.

    vLLM names the memory that ranks share on a CPU by the end of the address, which is the same for every run, and does
    not start where something of that name is there already.
    """

    def _distributed_args(self) -> Any:
        _, rank, local_rank = super()._distributed_args()
        return f"env://:{of_first_rank(uuid4().hex)}", rank, local_rank
