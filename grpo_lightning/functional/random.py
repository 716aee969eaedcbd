"""Counter-based random numbers: pure functions of coordinates, without a generator's hidden state."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    r"""Philox-4x32-10: four independent 32-bit words for each 128-bit counter under a 64-bit key.

    One round multiplies two words of the counter into 64-bit products and mixes their halves with the rest:

    .. math::
        (c_0, c_1, c_2, c_3) \leftarrow
        (\mathrm{hi}(M_1 c_2) \oplus c_1 \oplus k_0,\ \mathrm{lo}(M_1 c_2),\
         \mathrm{hi}(M_0 c_0) \oplus c_3 \oplus k_1,\ \mathrm{lo}(M_0 c_0))

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: Four int64 tensors of 32-bit words, broadcastable to one shape.
        key: Two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words, of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap at 64 bits exactly as unsigned ones do, and the mask takes the copied sign away.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniforms(*, seed: int, stream: int, iteration: int, slots: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) per coordinate, float64 with 53 random bits.

    Args:
        seed: In [0, 2**32).
        stream: What the numbers are for, in [0, 2**32), see `types.Stream`.
        iteration: In [0, 2**32).
        slots: int64 in [0, 2**32), the prompt's number within the iteration; broadcastable with the next two.
        samples: int64 in [0, 2**32), the completion's number within its group.
        positions: int64 in [0, 2**32), the token's number within the completion.

    Returns:
        A tensor of the broadcast shape, on the device of `slots`.

    Raises:
        ValueError: `seed`, `stream` or `iteration` is no 32-bit word.
    """
    key = (_word("seed", seed), _word("stream", stream))
    counter = (positions, samples, slots, torch.full_like(slots, _word("iteration", iteration)))
    high, low, _, _ = philox(counter, key)
    bits = ((high >> 5) << 26) | (low >> 6)
    return bits.double() * 2.0**-53


def seeds(*, seed: int, stream: int, iteration: int, slots: Tensor, samples: Tensor) -> Tensor:
    """A seed per completion, for engines whose generators draw the tokens of a completion themselves.

    Args:
        seed: In [0, 2**32).
        stream: What the numbers are for, in [0, 2**32), see `types.Stream`.
        iteration: In [0, 2**32).
        slots: int64 in [0, 2**32), the prompt's number within the iteration; broadcastable with the next one.
        samples: int64 in [0, 2**32), the completion's number within its group.

    Returns:
        int64 in [0, 2**63), of the broadcast shape.

    Raises:
        ValueError: `seed`, `stream` or `iteration` is no 32-bit word.
    """
    key = (_word("seed", seed), _word("stream", stream))
    # The last position, which no completion reaches: these words are independent of those of `uniforms`.
    counter = (torch.full_like(slots, _WORD), samples, slots, torch.full_like(slots, _word("iteration", iteration)))
    high, low, _, _ = philox(counter, key)
    return ((high >> 1) << 32) | low


def permutation(n: int, *, seed: int, stream: int, epoch: int) -> Tensor:
    """An order of 0 .. n - 1: the numbers sorted by their random 64-bit keys, equal keys in their natural order.

    Args:
        n: How many.
        seed: In [0, 2**32).
        stream: What the order is for, in [0, 2**32), see `types.Stream`.
        epoch: Which order, in [0, 2**32).

    Returns:
        int64, on the CPU.

    Raises:
        ValueError: `seed`, `stream` or `epoch` is no 32-bit word.
    """
    indices = torch.arange(n)
    zeros = torch.zeros_like(indices)
    counter = (indices, zeros, zeros, torch.full_like(indices, _word("epoch", epoch)))
    high, low, _, _ = philox(counter, (_word("seed", seed), _word("stream", stream)))
    return torch.argsort((high << 32) | low, stable=True)


def _word(name: str, value: int) -> int:
    if not 0 <= value <= _WORD:
        raise ValueError(f"{name} must be in [0, 2**32), got {value}.")
    return int(value)
