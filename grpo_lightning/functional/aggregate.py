r"""From values of tokens to one number, over denominators that are counted on the whole global minibatch.

Each is linear in the values of the tokens, so that the parts of any partition of the minibatch by completions add up to
the whole. Papers say "token mean" of two of them: `token_mean` weighs every token of the minibatch alike,
`prompt_mean_token_mean` every token of a group, and every group.
"""

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


def prompt_mean_token_mean(values_BT: Tensor, mask_BT: Tensor, group_tokens_B: Tensor, *, num_groups: float) -> Tensor:
    r""":math:`\frac{1}{n} \sum_p \frac{1}{\sum_{i \in p} |o_i|} \sum_{i \in p} \sum_t v_{i,t}`: every group alike.

    Args:
        values_BT: v.
        mask_BT: bool, the loss tokens.
        group_tokens_B: The loss tokens of the whole group that each completion belongs to, > 0.
        num_groups: n, the groups with loss tokens in the global minibatch, > 0.

    Source: DAPO, equation 12 (https://arxiv.org/abs/2503.14476): its expectation is over prompts, and the fraction
    inside of it.
    """
    return (values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1) / group_tokens_B).sum() / num_groups


def sequence_sum(values_BT: Tensor, mask_BT: Tensor, *, num_sequences: float) -> Tensor:
    r""":math:`\frac{1}{n} \sum_i \sum_t v_{i,t}`: the mean over completions of the sum over their tokens.

    The form of the policy gradient itself. Divided by a constant length it is that of Dr. GRPO.

    Args:
        values_BT: v.
        mask_BT: bool, the loss tokens.
        num_sequences: n, the completions with loss tokens in the global minibatch, > 0.

    Source: Understanding R1-Zero-Like Training (https://arxiv.org/abs/2503.20783).
    """
    return values_BT.masked_fill(~mask_BT, 0.0).sum() / num_sequences
