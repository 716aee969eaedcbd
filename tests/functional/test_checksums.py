"""Checksums against values worked by hand, and what they must notice."""

import pytest
import torch

from grpo_lightning.functional import checksums
from grpo_lightning.functional.checksums import checksum


def test_integers_by_hand():
    # a = 3 - 1 + 5 = 7, b = 1 * 3 + 3 * (-1) + 5 * 5 = 25
    assert checksum(torch.tensor([3, -1, 5], dtype=torch.int32)) == 7 + (25 << 32)


def test_floats_are_their_bits():
    # 1.0 is 0x3F800000 in fp32 and 0x3F80 in bf16; the first weight is 1.
    assert checksum(torch.tensor([1.0])) == 0x3F800000 + (0x3F800000 << 32)
    assert checksum(torch.tensor([1.0], dtype=torch.bfloat16)) == 0x3F80 + (0x3F80 << 32)


def test_nothing_is_zero():
    assert checksum(torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_last_bit_of_any_element_and_any_exchange_count(dtype):
    tensor = torch.randn(37, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = checksum(tensor)
    for i in range(37):
        changed = tensor.clone()
        changed[i] = torch.nextafter(changed[i], torch.tensor(9.0, dtype=dtype))
        exchanged = tensor.roll(1) if i == 0 else tensor[[*range(1, i + 1), 0, *range(i + 1, 37)]]
        assert checksum(changed) != whole
        assert checksum(exchanged) != whole


def test_chunks_and_strides_do_not_enter(monkeypatch):
    tensor = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    whole = checksum(tensor)
    assert checksum(tensor.t().contiguous().t()) == whole
    monkeypatch.setattr(checksums, "_COLUMNS", 5)
    assert checksum(tensor) == whole


def test_rows_of_many_columns_and_a_rest():
    # Of 2,500 elements, two rows of 1,024 and 452 more: every weight is 2 i + 1.
    tensor = torch.arange(2500, dtype=torch.int32) * 7919 - 9_000_000
    a = sum(tensor.tolist())
    b = sum((2 * i + 1) * value for i, value in enumerate(tensor.tolist()))
    assert checksum(tensor) % 2**64 == (a + (b << 32)) % 2**64
