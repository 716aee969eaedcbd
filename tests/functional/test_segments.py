import torch
from torch.nn.functional import scaled_dot_product_attention

from grpo_lightning.functional.segments import Segments, Span, Tree, segmented_attention

HEADS, WIDTH, TRUNK = 2, 4, 40
LENGTHS = (3, 1, 5)


def attended(trunk):
    """Output, gradients and saved bytes of one trunk with three tails."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = trunk + sum(LENGTHS)
    states = torch.randn(3, 1, HEADS, num_tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    starts = [trunk, trunk + LENGTHS[0], trunk + LENGTHS[0] + LENGTHS[1]]
    tails = tuple(Span(start, length) for start, length in zip(starts, LENGTHS, strict=True))
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = segmented_attention(*states, Segments.of([Tree(Span(0, trunk), tails)], torch.device("cpu")))
    return states, tails, output, sum(storages.values())


def test_tails_of_a_long_trunk_are_the_sequences_one_by_one_forward_and_backward():
    states, tails, output, _ = attended(TRUNK)
    (gradient,) = torch.autograd.grad(output.square().sum(), states, retain_graph=True)
    expected = torch.zeros_like(output)
    for tail in tails:
        index = torch.cat((torch.arange(TRUNK), torch.arange(tail.start, tail.start + tail.length)))
        whole = scaled_dot_product_attention(*states[:, :, :, index], is_causal=True).transpose(1, 2)
        expected = expected.index_put((torch.tensor(0), index), whole[0])
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), states)
    # Values of order one in double precision.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_copies_of_a_long_trunk_are_not_kept_for_the_backward_pass():
    # Of each further token four states stay, and some indices. Copies of its key and value for three tails would be six
    # more.
    state = HEADS * WIDTH * 8
    per_token = (attended(2 * TRUNK)[3] - attended(TRUNK)[3]) / TRUNK / state
    assert per_token < 5
