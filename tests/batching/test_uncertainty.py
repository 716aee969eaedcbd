import torch

from grpo_lightning.batching import Experience, Sample, uncertain_tokens
from grpo_lightning.types import MinibatchCounts


def sample(slot, *loss_mask):
    return Sample(
        slot=slot,
        index=0,
        prompt_ids=torch.tensor([1]),
        completion_ids=torch.zeros(len(loss_mask), dtype=torch.long),
        loss_mask=torch.tensor(loss_mask),
        group_tokens=sum(loss_mask),
    )


def test_each_minibatch_has_a_threshold_over_all_ranks_of_its_loss_tokens():
    experience = Experience.build(
        iteration=0,
        minibatches=[[sample(0, True, True), sample(1, True, False)], [sample(2, True, True)], []],
        counts=[MinibatchCounts(1, 1, 1)] * 3,
        metrics={},
        accumulate_grad_batches=1,
    )
    entropies = {(0, 0): torch.tensor([0.1, 0.5]), (1, 0): torch.tensor([0.3, 9.0]), (2, 0): torch.tensor([0.2, 0.7])}
    seen = []

    def gather(values):
        seen.append(values.tolist())
        return torch.cat([values, torch.tensor([0.4], dtype=torch.float64)])  # another rank's only token

    def median(values):
        return values.median()

    kept = uncertain_tokens(experience, entropies, threshold=median, gather=gather)
    # 0.1 0.3 0.4 0.5: the lower median is 0.3. 0.2 0.4 0.7: 0.4. What is no loss token does not count.
    assert [[round(x, 6) for x in values] for values in seen] == [[0.1, 0.5, 0.3], [0.2, 0.7], []]
    assert {place: row.tolist() for place, row in kept.items()} == {
        (0, 0): [False, True],
        (1, 0): [True, True],
        (2, 0): [False, True],
    }
