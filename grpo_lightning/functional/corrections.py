r"""Weights that make up for a sampler whose probabilities are not quite the trainer's.

The completions were drawn from :math:`\mu`, the update is measured against :math:`\pi_{old}`; the surrogate of a token
is multiplied by a function of :math:`w = \pi_{old} / \mu`, of the token or of its completion. A weight is a constant of
the update: its gradient would add :math:`\log\pi \cdot \nabla w`, which belongs to nothing. Both functions therefore
detach.
"""

from torch import Tensor

from grpo_lightning.functional.ratios import finite_exp


def truncated_weights(log_weights: Tensor, *, upper: float) -> Tensor:
    r""":math:`\min(w, C)`: truncated importance sampling (TIS).

    Args:
        log_weights: log of w, of tokens or of completions.
        upper: C, > 0; infinity truncates nothing.

    Source: Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training
    (https://fengyao.notion.site/off-policy-rl).
    """
    return finite_exp(log_weights.detach()).clamp(max=upper)


def masked_weights(log_weights: Tensor, log_gates: Tensor, *, lower: float, upper: float) -> Tensor:
    r""":math:`w \cdot 1[C_{low} \leq g \leq C_{high}]`: masked importance sampling.

    With g = w the token's own ratio it is IcePop; with both the ratio of the completion it drops improbable
    completions; with the token's w and g the completion's geometric mean, only completions that drifted.

    Args:
        log_weights: log of w, of tokens or of completions.
        log_gates: log of g.
        lower: C_low, >= 0.
        upper: C_high.

    Source: IcePop, Every Step Evolves (https://arxiv.org/abs/2510.18855), with bounds 0.5 and 5.
    """
    gates = finite_exp(log_gates.detach())
    return finite_exp(log_weights.detach()) * ((gates >= lower) & (gates <= upper))
