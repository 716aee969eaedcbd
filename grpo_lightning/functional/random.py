"""Counter-based random numbers: pure functions of coordinates, without a generator's hidden state."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four independent 32-bit words of each 128-bit counter under a 64-bit key.

    Args:
        counter: Four int64 tensors of 32-bit words, broadcastable to one shape.
        key: Two 32-bit words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # The product wraps at 64 bits like an unsigned one, so its two halves are exact.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniforms(
    *, seed: int, stream: int, iteration: int, slots: Tensor, samples: Tensor, positions: Tensor
) -> Tensor:
    """One number in [0, 1) per coordinate, float64 with 53 random bits.

    Args:
        seed: In [0, 2**32).
        stream: What the numbers are for, see `types.Stream`.
        iteration: In [0, 2**32).
        slots: int64, the prompt's number within the iteration.
        samples: int64, the completion's number within its group.
        positions: int64, the token's number within the completion.
    """
    words = philox((positions, samples, slots, torch.full_like(slots, iteration)), (_checked_seed(seed), stream))
    return ((words[0] >> 5) * 2.0**26 + (words[1] >> 6)).to(torch.float64) / 2.0**53


def permutation(n: int, *, seed: int, stream: int, epoch: int) -> Tensor:
    """An order of 0 .. n - 1: the numbers sorted by their random keys.

    Args:
        n: How many.
        seed: In [0, 2**32).
        stream: What the order is for, see `types.Stream`.
        epoch: Which order.
    """
    indices = torch.arange(n)
    zero = torch.zeros_like(indices)
    words = philox((indices, zero, zero, torch.full_like(indices, epoch)), (_checked_seed(seed), stream))
    return torch.argsort((words[0] << 31) | (words[1] >> 1), stable=True)


def _checked_seed(seed: int) -> int:
    if not 0 <= seed <= _WORD:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}.")
    return seed
