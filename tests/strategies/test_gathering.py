import pytest
from torch import nn

from grpo_lightning.strategies import Placement
from grpo_lightning.strategies.gathering import GIB, GatheredSize, check_gathering, gathered_size
from grpo_lightning.strategies.zero_placement import ZeRO3Placement
from grpo_lightning.types import ConfigurationError


def test_what_is_around_the_blocks_and_two_blocks_are_gathered_at_once():
    blocks = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(4, 2, bias=False)])
    size = gathered_size(nn.ModuleDict({"head": nn.Linear(5, 1), "blocks": blocks}), lambda weight: 2 * weight.numel())
    # 5 + 1 elements around, 6 and 8 in the blocks; two bytes each
    assert (size.whole, size.around, size.block, size.at_once) == (40, 12, 16, 12 + 2 * 16)


def test_a_choice_says_its_price():
    size = GatheredSize(whole=8 * GIB, around=2 * GIB, block=GIB)
    assert "all weights together once, 8.00 GiB" in size.in_words("whole")
    layerwise = size.in_words("layerwise")
    assert "at most 4.00 GiB at once" in layerwise
    assert "exchange 6.00 GiB for every token" in layerwise


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [(3 * GIB // 2, "1.50 GiB"), (5 * 2**18, "1.25 MiB"), (2048, "2.00 KiB"), (1023, "1023 bytes")],
)
def test_a_small_price_is_said_in_small_units(num_bytes, said):
    size = GatheredSize(whole=num_bytes, around=0, block=0)
    assert f"once, {said} on every rank" in size.in_words("whole")


def test_layers_are_put_together_where_they_are_in_shards():
    check_gathering("layerwise", ZeRO3Placement)
    check_gathering("whole", Placement)
    with pytest.raises(ConfigurationError, match=r"model\.engine\.gather must be whole .* got layerwise"):
        check_gathering("layerwise", Placement)
