import pytest
import torch

from grpo_lightning.batching import Experience, Sample
from grpo_lightning.batching.experience import loss_batch, merged_state
from grpo_lightning.types import MinibatchCounts

CPU = torch.device("cpu")


def sample(slot, index=0, *, prompt=1, completion=2, advantage=0.0, **more):
    return Sample(
        slot=slot,
        index=index,
        prompt_ids=torch.full((prompt,), 5),
        completion_ids=torch.full((completion,), 7),
        loss_mask=more.pop("loss_mask", torch.ones(completion, dtype=torch.bool)),
        advantage=advantage,
        **more,
    )


def build(*minibatches, accumulate=1):
    counts = [MinibatchCounts(tokens=10 + m, sequences=2, groups=1) for m in range(len(minibatches))]
    return Experience.build(
        iteration=3,
        minibatches=minibatches,
        counts=counts,
        metrics={"reward/mean": 0.5},
        accumulate_grad_batches=accumulate,
    )


def places(samples):
    return [(s.slot, s.index) for s in samples]


def same(one, other):
    assert (one.iteration, one.counts, one.bins, one.metrics) == (
        other.iteration,
        other.counts,
        other.bins,
        other.metrics,
    )
    for mine, theirs in zip(one.minibatches, other.minibatches, strict=True):
        assert places(mine) == places(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.advantage == b.advantage
            for name in ("prompt_ids", "completion_ids", "loss_mask", "old_logprobs", "reference_logprobs"):
                torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=0, rtol=0)


def test_samples_stand_in_the_order_of_slot_and_index_however_they_came():
    experience = build([sample(2, 1), sample(0, 1), sample(2, 0), sample(0, 0)])
    assert places(experience.minibatches[0]) == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_a_minibatch_is_spread_over_its_micro_batches():
    # Lengths 9, 3, 3, 3: the long one alone costs 9, the three others cost 3 x 3 = 9.
    samples = [sample(0, completion=8), *(sample(s) for s in (1, 2, 3))]
    experience = build(samples, accumulate=2)
    assert [places(experience.microbatch(0, i)) for i in range(2)] == [[(0, 0)], [(1, 0), (2, 0), (3, 0)]]


def test_every_micro_batch_of_every_minibatch_exists_and_holds_each_sample_once():
    experience = build([sample(0)], [], [sample(s, i) for s in (1, 2) for i in range(3)], accumulate=4)
    for m, samples in enumerate(experience.minibatches):
        found = [place for i in range(4) for place in places(experience.microbatch(m, i))]
        assert sorted(found) == places(samples)
    assert [experience.microbatch(1, i) for i in range(4)] == [[], [], [], []]


def test_logprobs_are_filled_in_by_minibatch_and_sample_and_leave_the_rest():
    bare = build([sample(0), sample(1)], [sample(2)])
    old = [[torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])], [torch.tensor([-5.0, -6.0])]]
    filled = bare.with_logprobs("old_logprobs", old)
    assert [s.old_logprobs.tolist() for m in filled.minibatches for s in m] == [[-1, -2], [-3, -4], [-5, -6]]
    assert all(s.reference_logprobs is None for m in filled.minibatches for s in m)
    assert all(s.old_logprobs is None for m in bare.minibatches for s in m)
    assert (filled.bins, filled.counts) == (bare.bins, bare.counts)


def test_logprobs_of_other_samples_are_not_taken():
    with pytest.raises(ValueError, match="argument"):
        build([sample(0), sample(1)]).with_logprobs("old_logprobs", [[torch.zeros(2)]])


def whole(accumulate=1):
    first = [sample(s, i, completion=1 + s + i, advantage=s - i / 2) for s in (0, 1) for i in range(2)]
    second = [sample(s, i, prompt=1 + s, old_logprobs=torch.tensor([0.5, s])) for s in (2, 3) for i in range(2)]
    return build(first, second, accumulate=accumulate)


def test_one_rank_takes_up_what_it_left():
    before = whole(accumulate=3)
    after = Experience.from_state_dict(before.state_dict(), rank=0, world_size=1, accumulate_grad_batches=3)
    same(after, before)


@pytest.mark.parametrize(("written_by", "read_by"), [(2, 2), (2, 1), (1, 2), (2, 4)])
def test_any_number_of_ranks_takes_up_what_any_other_left(written_by, read_by):
    state = whole().state_dict()
    shares = [
        Experience.from_state_dict(state, rank=rank, world_size=written_by, accumulate_grad_batches=1).state_dict()
        for rank in range(written_by)
    ]
    merged = merged_state(shares)
    assert sum(len(samples) for samples in merged["minibatches"]) == 8
    for rank in range(read_by):
        share = Experience.from_state_dict(merged, rank=rank, world_size=read_by, accumulate_grad_batches=1)
        assert {s.slot % read_by for samples in share.minibatches for s in samples} == {rank}
        same(share, Experience.from_state_dict(state, rank=rank, world_size=read_by, accumulate_grad_batches=1))
        assert share.counts == whole().counts, "counts are those of all ranks"


def test_a_state_is_plain(tmp_path):
    torch.save(whole().state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    same(Experience.from_state_dict(loaded, rank=0, world_size=1, accumulate_grad_batches=1), whole())


def test_a_loss_batch_is_padded_with_what_counts_for_nothing():
    masked = torch.tensor([True, False, True])
    samples = [
        sample(0, completion=1, advantage=0.5, old_logprobs=torch.tensor([-1.0])),
        sample(1, completion=3, advantage=-2.0, old_logprobs=torch.tensor([-2.0, -3.0, -4.0]), loss_mask=masked),
    ]
    batch = loss_batch(samples, CPU)
    assert batch.advantages_BT.tolist() == [[0.5], [-2.0]]
    assert batch.advantages_BT.dtype == torch.float64
    assert batch.mask_BT.tolist() == [
        [True, False, False],
        [True, False, True],
    ]
    assert batch.old_logprobs_BT.tolist() == [
        [-1.0, 0.0, 0.0],
        [-2.0, -3.0, -4.0],
    ]
    assert batch.reference_logprobs_BT is None
