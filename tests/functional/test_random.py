import itertools
import random

import pytest
import torch

from grpo_lightning.functional.random import permutation, philox, uniforms

WORD = 0xFFFFFFFF


def reference_philox(counter, key):
    """Philox-4x32-10 in Python's integers, written from the paper's figure."""
    c, (k0, k1) = list(counter), key
    for i in range(10):
        r0, r1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b // 2**32 ^ c[1] ^ r0, b % 2**32, a // 2**32 ^ c[3] ^ r1, a % 2**32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers of Random123, the authors' library.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_philox_agrees_with_integer_arithmetic_on_random_counters():
    generator = random.Random(0)
    counters = [[generator.getrandbits(32) for _ in range(4)] for _ in range(200)]
    key = (generator.getrandbits(32), generator.getrandbits(32))
    words = torch.stack(philox(tuple(torch.tensor(column) for column in zip(*counters, strict=True)), key), dim=1)
    assert words.tolist() == [reference_philox(counter, key) for counter in counters]


def one(**changes):
    coordinates = {"seed": 3, "stream": 0, "iteration": 5, "slots": 7, "samples": 2, "positions": 11} | changes
    tensors = {name: torch.tensor(coordinates.pop(name)) for name in ("slots", "samples", "positions")}
    return uniforms(**coordinates, **tensors)


def test_a_uniform_is_the_top_53_bits_of_two_words():
    # Counter (position, sample, slot, iteration), key (seed, stream): all zero is the first known answer.
    drawn = one(seed=0, iteration=0, slots=0, samples=0, positions=0)
    assert drawn.dtype == torch.float64
    assert drawn.item() == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_a_uniform_is_exact_whatever_the_default_precision():
    words = reference_philox((11, 2, 7, 5), (3, 0))
    assert one().item() == ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53


@pytest.mark.parametrize("name", ["seed", "stream", "iteration", "slots", "samples", "positions"])
def test_each_coordinate_changes_the_number(name):
    assert one(**{name: 12}).item() != one().item()


def test_coordinates_that_trade_places_give_other_numbers():
    names = ("seed", "stream", "iteration", "slots", "samples", "positions")
    drawn = {one(**dict(zip(names, order, strict=True))).item() for order in itertools.permutations(range(6))}
    assert len(drawn) == 720


def test_a_number_does_not_depend_on_what_is_drawn_with_it():
    slots, samples, positions = torch.arange(6)[:, None, None], torch.arange(4)[:, None], torch.arange(9)
    together = uniforms(seed=1, stream=2, iteration=3, slots=slots, samples=samples, positions=positions)
    assert together.shape == (6, 4, 9)
    for slot, sample, position in [(0, 0, 0), (5, 3, 8), (2, 1, 7)]:
        alone = one(seed=1, stream=2, iteration=3, slots=slot, samples=sample, positions=position)
        assert alone.item() == together[slot, sample, position].item()


def test_numbers_are_uniform_and_below_one():
    drawn = uniforms(
        seed=0, stream=0, iteration=0, slots=torch.arange(100)[:, None], samples=torch.zeros(1).long(),
        positions=torch.arange(1000),
    )  # fmt: skip
    assert 0 <= drawn.min().item() < drawn.max().item() < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    # 99 degrees of freedom: mean 99, standard deviation 14; the numbers are fixed, so this cannot flicker.
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 4 * 14
    assert abs(torch.corrcoef(torch.stack((drawn[:, :-1].flatten(), drawn[:, 1:].flatten())))[0, 1]) < 0.01


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_a_permutation_holds_every_number_once(n):
    order = permutation(n, seed=1, stream=4, epoch=0)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))


def test_a_permutation_sorts_by_64_bit_keys():
    keys = [reference_philox((i, 0, 0, 6), (2, 4))[:2] for i in range(300)]
    signed = [(high << 32 | low) - (high >> 31 << 64) for high, low in keys]
    assert permutation(300, seed=2, stream=4, epoch=6).tolist() == sorted(range(300), key=signed.__getitem__)


def test_seeds_streams_and_epochs_give_other_orders():
    coordinates = [(1, 4, 0), (2, 4, 0), (1, 5, 0), (1, 4, 1)]
    orders = {tuple(permutation(50, seed=a, stream=b, epoch=c).tolist()) for a, b, c in coordinates}
    assert len(orders) == 4


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40])
def test_a_seed_beyond_32_bits_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*32\)"):
        one(seed=seed)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*32\)"):
        permutation(3, seed=seed, stream=4, epoch=0)
