"""From rewards of single tokens to what a token is credited with: everything that follows it."""

from torch import Tensor


def suffix_sums(values_BT: Tensor) -> Tensor:
    r""":math:`R_t = \sum_{s \geq t} v_s`, the undiscounted return of each token, itself included.

    With the normalised scores of the steps at the steps' last tokens it is the advantage of process supervision, and 0
    behind the last step. With :math:`-\beta \log(\pi_{old} / \pi_{ref})` it is the penalty that PPO takes off the
    reward, as reward to go.

    Args:
        values_BT: v; 0 where a completion has no loss token.

    Source: DeepSeekMath, section 4.1.3 and equation 2 (https://arxiv.org/abs/2402.03300).

    Example:
        >>> import torch
        >>> suffix_sums(torch.tensor([[1.0, 0.0, 2.0]])).tolist()
        [[3.0, 2.0, 2.0]]
    """
    return values_BT.flip(-1).cumsum(-1).flip(-1)
