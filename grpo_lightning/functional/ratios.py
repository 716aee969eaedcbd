r"""Probability ratios, as logarithms: of a token, or of a whole completion.

Each function takes the log-ratios of the tokens, :math:`\ell_t = \log \pi_\theta(o_t) - \log \pi_{old}(o_t)`, and
makes those that the surrogate sees.
"""

from torch import Tensor

MAX_LOG = 40.0
"""Beyond this a log-ratio is as good as infinite. A product of two such ratios is still finite in fp32."""


def finite_exp(log_ratios: Tensor) -> Tensor:
    """Exp that stays finite, with a finite gradient, at any log-ratio: beyond +-40 it goes on as a constant."""
    return log_ratios.clamp(-MAX_LOG, MAX_LOG).exp()


def sequence_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    r""":math:`\sum_t \ell_t` over the loss tokens, shape [B, 1]: the log-ratio of the whole completion."""
    return values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1, keepdim=True)


def sequence_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    r""":math:`\frac{1}{|o|} \sum_t \ell_t` over the loss tokens, shape [B, 1]; 0 where there are none.

    Its exponential is the geometric mean of the tokens' ratios,
    :math:`s_i = (\pi_\theta(o_i) / \pi_{old}(o_i))^{1/|o_i|}`.

    Source: GSPO, equation 7 (https://arxiv.org/abs/2507.18071).

    Example:
        >>> import torch
        >>> sequence_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
        [[2.0]]
    """
    return sequence_sum(values_BT, mask_BT) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)


def sequence_value_token_gradient(log_ratios_BT: Tensor, mask_BT: Tensor) -> Tensor:
    r""":math:`\log s_{i,t} = \operatorname{sg}[\log s_i] + \ell_t - \operatorname{sg}[\ell_t]`.

    The value of the completion's geometric mean with the gradient of each token's own log-probability, so that tokens
    of one completion may have different advantages.

    Source: GSPO, equation 14 (GSPO-token, https://arxiv.org/abs/2507.18071).
    """
    return sequence_mean(log_ratios_BT, mask_BT).detach() + log_ratios_BT - log_ratios_BT.detach()
