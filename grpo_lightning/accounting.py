r"""The work that an iteration needs: floating-point operations of the update, bytes that decoding reads.

What is counted is what the mathematics needs, whatever the layout: every distinct token once, so that padding, prompts
that are computed again for each completion, and activations that are computed again show as a lower utilisation. A
product of an m x k by a k x n matrix is 2mkn operations; norms, activations, softmax and the optimizer are left out.

Symbols: W weights of the layers' matrices, D width, V vocabulary, H the width of all heads together, H_kv that of the
key heads, J layers; a token that attends over c keys, its own included, takes

.. math::
    2 W + 4 J H c

operations, and 2DV more where its logits are needed (Chowdhery et al., "PaLM", appendix B,
https://arxiv.org/abs/2204.02311). The backward pass needs as many for the gradients of the inputs, and once more for
those of the weights; frozen weights need none. Under an adapter its matrices are among W, and alone are trained. (That
the first layer's inputs then need no gradient either is left out.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the counts depend on."""

    layer_weights: int
    """W, over all layers: biases and norms, which multiply nothing by a matrix, are left out."""
    trained_layer_weights: int
    """Of them those that are trained."""
    head_weights: int
    """D V, of the language-model head, also where it is the input embedding."""
    trained_head_weights: int
    """0 where the head is frozen."""
    num_layers: int
    attention_width: int
    """H: heads times the width of one."""
    key_width: int
    """H_kv: key heads times the width of one."""
    weight_bytes: int
    """Of one weight, and of one entry of the cache."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelSize | None":
        """The size of a dense decoder; None where experts are chosen per token, since then not all weights are used."""
        config = model.config.get_text_config()
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        head = model.get_output_embeddings()
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        tables |= set() if head is None else {id(head.weight)}
        matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in tables]
        num_heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        head_weights = config.hidden_size * config.vocab_size if head is None else head.weight.numel()
        return cls(
            layer_weights=sum(p.numel() for p in matrices),
            trained_layer_weights=sum(p.numel() for p in matrices if p.requires_grad),
            head_weights=head_weights,
            trained_head_weights=head_weights if head is None or head.weight.requires_grad else 0,
            num_layers=config.num_hidden_layers,
            attention_width=num_heads * head_width,
            key_width=(getattr(config, "num_key_value_heads", None) or num_heads) * head_width,
            weight_bytes=next(model.parameters()).element_size(),
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """The lengths of a prompt and of its completions, in tokens."""

    prompt: int
    completions: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Distinct tokens: the prompt once."""
        return self.prompt + sum(self.completions)


def forward_flops(size: ModelSize, group: Group) -> int:
    """Operations that score every completion token of a group once.

    A completion's last token predicts nothing and is not fed. The head is applied to what predicts a completion token.

    A prompt of 2 tokens with completions of 1 and 3: the prompt attends over 1 and 2 keys, the second completion's
    first two tokens over 3 and 4, so that 4 tokens attend over 10 keys; 4 tokens are predicted, the first ones of both
    completions from one state: 3 states go through the head.
    """
    return _attention(size, group) + _products(size.layer_weights, size.head_weights, group)


def update_flops(size: ModelSize, groups: Iterable[Group]) -> int:
    """Operations of the forward and backward pass over some groups; nothing that is computed again is counted.

    The backward pass costs a forward for each operand of a product that has a gradient: in attention both have, in a
    layer the states have, and the weights that are trained.
    """
    return sum(
        2 * forward_flops(size, group)
        + _attention(size, group)
        + _products(size.trained_layer_weights, size.trained_head_weights, group)
        for group in groups
    )


def decode_bytes(size: ModelSize, groups: Sequence[Group]) -> int:
    """Bytes that drawing the completions reads at least.

    All completions are decoded side by side: a step reads the weights once, the keys and values of each prompt once for
    its group, and those of each completion's own tokens. The first token comes from reading the prompt, which is no
    step of decoding. With the groups above: 2 steps, the prompt's 2 tokens in both, own tokens 1 and 2.
    """
    longest = [max(group.completions, default=0) for group in groups]
    num_steps = max([0, *(length - 1 for length in longest)])
    weights = num_steps * (size.layer_weights + size.head_weights)
    prompts = sum(group.prompt * max(length - 1, 0) for group, length in zip(groups, longest, strict=True))
    own = sum(_sum_to(length - 1) for group in groups for length in group.completions if length)
    cached = 2 * size.num_layers * size.key_width * (prompts + own)
    return size.weight_bytes * (weights + cached)


def _products(layer_weights: int, head_weights: int, group: Group) -> int:
    """Operations with weights."""
    fed = [length - 1 for length in group.completions if length]
    num_states = sum(fed) + (1 if fed else 0)
    return 2 * layer_weights * (group.prompt + sum(fed)) + 2 * head_weights * num_states


def _attention(size: ModelSize, group: Group) -> int:
    """Operations of queries with keys, and of what they give with values."""
    before = _sum_to(group.prompt)
    num_keys = before + sum(_sum_to(group.prompt + length - 1) - before for length in group.completions if length)
    return 4 * size.num_layers * size.attention_width * num_keys


def _sum_to(n: int) -> int:
    """1 + 2 + ... + n."""
    return n * (n + 1) // 2
