from functools import partial
from math import ceil

import torch
from mutants import Mutant, keyword

from grpo_lightning.batching import Experience, Padded, Sample, uncertainty
from grpo_lightning.objective import TopEntropyTokens
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
        layout=Padded(),
    )
    entropies = {(0, 0): torch.tensor([0.1, 0.5]), (1, 0): torch.tensor([0.3, 9.0]), (2, 0): torch.tensor([0.2, 0.7])}
    seen = []

    def gather(values):
        seen.append(values.tolist())
        return torch.cat([values, torch.tensor([0.4], dtype=torch.float64)])  # another rank's only token

    def median(values):
        return values.median()

    kept = uncertainty.uncertain_tokens(experience, entropies, threshold=median, gather=gather)
    # 0.1 0.3 0.4 0.5: the lower median is 0.3. 0.2 0.4 0.7: 0.4. What is no loss token does not count.
    assert [[round(x, 6) for x in values] for values in seen] == [[0.1, 0.5, 0.3], [0.2, 0.7], []]
    assert {place: row.tolist() for place, row in kept.items()} == {
        (0, 0): [False, True],
        (1, 0): [True, True],
        (2, 0): [False, True],
    }


def experience_of(samples):
    return Experience.build(
        iteration=0,
        minibatches=[samples],
        counts=[MinibatchCounts(1, 1, 1)],
        metrics={},
        accumulate_grad_batches=1,
        layout=Padded(),
    )


def test_the_share_is_of_the_minibatch_over_all_ranks(prove):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 7, 1, 5, 4, 9]
    samples = [sample(slot, *[True] * length) for slot, length in enumerate(lengths)]
    # The later the slot, the more uncertain: the ranks' own quantiles differ from each other's.
    entropies = {(s, 0): s + torch.rand(n, generator=generator).double() for s, n in enumerate(lengths)}
    shares = ([samples[0], samples[1], samples[2]], [samples[3], samples[4], samples[5]])

    def error():
        errors = []
        for share in (0.2, 0.35, 0.8, 1.0):
            threshold = TopEntropyTokens(share=share).threshold
            sent = []
            for rank in shares:  # what each rank hands to the collective
                uncertainty.uncertain_tokens(
                    experience_of(rank), entropies, threshold=threshold, gather=lambda v, to=sent: to.append(v) or v
                )
            everyone = torch.cat(sent)
            kept = {}
            for rank in shares:
                gather = partial(lambda values, everyone: everyone, everyone=everyone)
                kept |= uncertainty.uncertain_tokens(experience_of(rank), entropies, threshold=threshold, gather=gather)
            number = sum(int(row.sum()) for row in kept.values())
            errors.append(abs(number - ceil(share * sum(lengths))))
            least = torch.cat(list(entropies.values())).sort(descending=True).values[ceil(share * sum(lengths)) - 1]
            errors += [int((row != (entropies[place] >= least)).sum()) for place, row in kept.items()]
        return float(max(errors))

    def by_itself(of_minibatches):
        def mutated(*args, gather, **others):
            of_minibatches(*args, gather=gather, **others)
            return of_minibatches(*args, gather=lambda values: values, **others)

        return mutated

    prove(
        "the top ceil(share N) tokens by entropy are kept, of the minibatch over all ranks",
        "Beyond the 80/20 Rule, equation 6",
        error,
        Mutant("each rank by itself", "batching.uncertainty.uncertain_tokens", by_itself),
        keyword("one token fewer", "objective.mask.top_entropy_threshold", share=lambda share: 0.7 * share),
        tolerance=0.0,
    )
