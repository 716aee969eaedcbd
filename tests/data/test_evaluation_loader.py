import pytest

from grpo_lightning.data import EvaluationLoader
from grpo_lightning.types import Prompt


def batches(n, batch_size, rank, world_size):
    prompts = [Prompt(index=100 + i, token_ids=(i,), text="") for i in range(n)]
    loader = EvaluationLoader(prompts, batch_size, rank, world_size)
    result = list(loader)
    assert len(result) == len(loader)
    return [[prompt.slot for prompt in batch] for batch in result]


def test_the_ranks_take_turns_by_slot():
    #             batch 0      batch 1   batch 2: one prompt for two ranks
    assert batches(7, 3, rank=0, world_size=2) == [[0, 2], [4], [6]]
    assert batches(7, 3, rank=1, world_size=2) == [[1], [3, 5], []]


def test_a_slot_is_the_place_not_the_index():
    (batch,) = EvaluationLoader([Prompt(index=100, token_ids=(1,), text="")], 4, 0, 1)
    assert (batch[0].slot, batch[0].prompt.index) == (0, 100)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 4, 11])
def test_every_prompt_goes_to_one_rank_and_every_rank_has_as_many_batches(n, world_size):
    ranks = [batches(n, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(slot for rank in ranks for batch in rank for slot in batch) == list(range(n))


def test_it_can_be_read_again():
    loader = EvaluationLoader([Prompt(index=0, token_ids=(1,), text="")], 4, 0, 1)
    assert list(loader) == list(loader)
