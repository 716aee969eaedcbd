r"""The work that the mathematics of a step needs, in floating-point operations.

Every distinct token goes once through the policy's forward and backward pass (a backward costs two forwards), the
reference's forward, and the rollout. Completions of one prompt share it; a completion's last token predicts nothing and
is never fed; the head is applied to the states that predict a completion token, and the last state of a prompt does so
for its whole group. A product of an m x k by a k x n matrix is 2mkn operations. A query over c keys costs
:math:`4 c d` in attention, scores and values. Norms, activations, softmax and the optimizer are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.benchmark.workloads import ModelShape, Workload


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one step, by what they are for."""

    prefill: int
    decode: int
    reference: int
    update: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.prefill + self.decode + self.reference + self.update


def step_flops(workload: Workload, lengths: Sequence[int]) -> StepFlops:
    """Count the operations of one step.

    Args:
        workload: What the step does.
        lengths: The tokens of each completion.
    """
    prompt, model = workload.prompt_tokens, workload.model
    prefill = workload.num_prompts * _forward(model, range(1, prompt + 1), num_predictions=1)
    decode = sum(_forward(model, range(prompt + 1, prompt + n), num_predictions=n - 1) for n in lengths)
    forward = prefill + decode
    return StepFlops(
        prefill=prefill,
        decode=decode,
        reference=forward if workload.kl_coefficient > 0 else 0,
        update=3 * forward,
    )


def _forward(model: ModelShape, contexts: range, *, num_predictions: int) -> int:
    """Operations of tokens that each attend over so many keys, some of which go through the head."""
    matrices = 2 * model.layer_weights * len(contexts)
    attention = 4 * model.hidden * sum(contexts)
    return model.layers * (matrices + attention) + 2 * model.hidden * model.vocabulary * num_predictions
