import torch

from grpo_lightning.batching import Packed, Row, SharedPrefix

CPU = torch.device("cpu")
P, Q = torch.tensor([5, 9]), torch.tensor([6])
ROWS = [
    Row(0, P, torch.tensor([7, 1])),
    Row(3, Q, torch.tensor([8, 4, 1])),
    Row(0, P, torch.tensor([2])),
    Row(0, P, torch.tensor([3, 4, 5])),
]


def test_shared_prefix_by_hand():
    batch = SharedPrefix().lay_out(ROWS, CPU)
    #                                     prompt  7  .  3  4 | 6  8  4     the last token of each is left out
    assert batch.input_ids_RL.tolist() == [[5, 9, 7, 3, 4, 6, 8, 4]]
    assert batch.position_ids_RL.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2]]
    assert batch.targets_N.tolist() == [7, 1, 8, 4, 1, 2, 3, 4, 5]
    #                                     7 from 9, 1 from 7; 8 from 6 ...; 2 from 9; 3 from 9, 4 from 3, 5 from 4
    assert batch.positions_N.tolist() == [1, 2, 5, 6, 7, 1, 1, 3, 4]
    assert batch.rows_N.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert batch.columns_N.tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 2]
    assert (batch.num_completions, batch.max_completion_tokens) == (4, 3)


def test_packed_by_hand():
    batch = Packed().lay_out(ROWS[:3], CPU)
    assert batch.input_ids_RL.tolist() == [[5, 9, 7, 6, 8, 4, 5, 9]]
    assert batch.position_ids_RL.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch.positions_N.tolist() == [1, 2, 3, 4, 5, 7]
    assert batch.targets_N.tolist() == [7, 1, 8, 4, 1, 2]
