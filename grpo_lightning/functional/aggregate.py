"""From values of tokens to one number, over denominators that are counted on the whole global minibatch."""

from torch import Tensor


def sequence_mean_token_mean(values_BT: Tensor, mask_BT: Tensor, *, num_sequences: float) -> Tensor:
    r""":math:`\frac{1}{n} \sum_i \frac{1}{|o_i|} \sum_t v_{i,t}`: every completion weighs the same.

    Args:
        values_BT: v.
        mask_BT: bool, the loss tokens; \|o_i\| is their number in row i.
        num_sequences: n, the completions with loss tokens in the global minibatch, > 0.

    Source: DeepSeekMath, equation 3 (https://arxiv.org/abs/2402.03300).
    """
    lengths_B = mask_BT.sum(dim=1).clamp(min=1)
    return (values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1) / lengths_B).sum() / num_sequences


def token_mean(values_BT: Tensor, mask_BT: Tensor, *, num_tokens: float) -> Tensor:
    r""":math:`\frac{1}{n} \sum_i \sum_t v_{i,t}`: every token of the global minibatch weighs the same.

    Args:
        values_BT: v.
        mask_BT: bool, the loss tokens.
        num_tokens: n, the loss tokens of the global minibatch, > 0.
    """
    return values_BT.masked_fill(~mask_BT, 0.0).sum() / num_tokens
