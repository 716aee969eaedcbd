import torch

from grpo_lightning.batching import Padded, Row


def test_layout_by_hand():
    rows = [Row(0, torch.tensor([5, 9]), torch.tensor([7])), Row(1, torch.tensor([6]), torch.tensor([8, 4, 1]))]
    batch = Padded().lay_out(rows, torch.device("cpu"))
    assert batch.input_ids_RL.tolist() == [[5, 9, 7, 0], [6, 8, 4, 1]]
    #                                       7 is predicted at 1; 8, 4, 1 at 4, 5, 6 of the flattened rows
    assert batch.positions_N.tolist() == [1, 4, 5, 6]
    assert batch.targets_N.tolist() == [7, 8, 4, 1]
    assert batch.rows_N.tolist() == [0, 1, 1, 1]
    assert batch.columns_N.tolist() == [0, 0, 1, 2]
    assert (batch.num_completions, batch.max_completion_tokens) == (2, 3)
