from dataclasses import fields, replace

import pytest
import torch

from grpo_lightning.batching import Experience, Padded, Sample
from grpo_lightning.batching.experience import loss_batch, merged_state
from grpo_lightning.types import MinibatchCounts

CPU = torch.device("cpu")
ALONE = {"accumulate_grad_batches": 1, "layout": Padded()}


def sample(slot, index=0, *, prompt=1, completion=2, advantage=0.0, **more):
    return Sample(
        slot=slot,
        index=index,
        prompt_ids=torch.full((prompt,), 5),
        completion_ids=torch.full((completion,), 7),
        loss_mask=more.pop("loss_mask", torch.ones(completion, dtype=torch.bool)),
        group_tokens=completion,
        advantages=torch.tensor([advantage], dtype=torch.float64),
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
        layout=Padded(),
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
            assert_equal(a, b)
    assert_equal(one.blank, other.blank)


def assert_equal(a, b):
    assert (a.slot, a.index, a.group_tokens) == (b.slot, b.index, b.group_tokens)
    for name in [field.name for field in fields(Sample) if field.name not in ("slot", "index", "group_tokens")]:
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
        assert sorted(set(found) - {experience.blank.place}) == places(samples)
    assert [experience.microbatch(1, i) for i in range(4)] == [[experience.blank]] * 4


def test_every_epoch_takes_the_minibatches_in_the_same_order():
    experience = build([sample(0)], [sample(1)])
    assert [places(experience.microbatch(update, 0)) for update in range(4)] == [[(0, 0)], [(1, 0)]] * 2
    assert [experience.counts_of(update).tokens for update in range(4)] == [10, 11, 10, 11]


def test_a_column_is_filled_in_by_place_and_leaves_the_rest():
    bare = build([sample(0), sample(1)], [sample(2)])
    old = {(2, 0): torch.tensor([-5.0, -6.0]), (0, 0): torch.tensor([-1.0, -2.0]), (1, 0): torch.tensor([-3.0, -4.0])}
    filled = bare.with_column("old_logprobs", old, dtype=torch.float32)
    assert [s.old_logprobs.tolist() for s in filled.samples()] == [[-1, -2], [-3, -4], [-5, -6]]
    assert all(s.reference_logprobs is None for s in filled.samples())
    assert all(s.old_logprobs is None for s in bare.samples())
    assert (filled.bins, filled.counts) == (bare.bins, bare.counts)


def test_the_blank_sample_has_every_column_also_where_there_are_no_samples():
    filled = build([]).with_column("policy_mask", {}, dtype=torch.bool)
    assert filled.blank.policy_mask.tolist() == [False]
    assert filled.blank.old_logprobs is None
    assert not filled.blank.loss_mask.any()


def test_a_column_without_a_row_for_a_sample_is_a_defect():
    with pytest.raises(KeyError):
        build([sample(0), sample(1)]).with_column("old_logprobs", {(0, 0): torch.zeros(2)}, dtype=torch.float32)


def whole(accumulate=1):
    first = [sample(s, i, completion=1 + s + i, advantage=s - i / 2) for s in (0, 1) for i in range(2)]
    second = [sample(s, i, prompt=1 + s, old_logprobs=torch.tensor([0.5, s])) for s in (2, 3) for i in range(2)]
    return build(first, second, accumulate=accumulate)


def test_one_rank_takes_up_what_it_left():
    before = whole(accumulate=3)
    after = Experience.from_state_dict(
        before.state_dict(), rank=0, world_size=1, accumulate_grad_batches=3, layout=Padded()
    )
    same(after, before)


@pytest.mark.parametrize(("written_by", "read_by"), [(2, 2), (2, 1), (1, 2), (2, 4)])
def test_any_number_of_ranks_takes_up_what_any_other_left(written_by, read_by):
    state = whole().state_dict()
    shares = [
        Experience.from_state_dict(
            state, rank=rank, world_size=written_by, accumulate_grad_batches=1, layout=Padded()
        ).state_dict()
        for rank in range(written_by)
    ]
    merged = merged_state(shares)
    assert sum(len(samples) for samples in merged["minibatches"]) == 8
    for rank in range(read_by):
        share = Experience.from_state_dict(
            merged, rank=rank, world_size=read_by, accumulate_grad_batches=1, layout=Padded()
        )
        assert {s.slot % read_by for samples in share.minibatches for s in samples} == {rank}
        same(
            share,
            Experience.from_state_dict(
                state, rank=rank, world_size=read_by, accumulate_grad_batches=1, layout=Padded()
            ),
        )
        assert share.counts == whole().counts, "counts are those of all ranks"


def test_a_state_is_plain(tmp_path):
    torch.save(whole().state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    same(Experience.from_state_dict(loaded, rank=0, world_size=1, **ALONE), whole())


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
    assert batch.group_tokens_B.tolist() == [1, 3]
    assert batch.reference_logprobs_BT is batch.sampler_logprobs_BT is batch.policy_mask_BT is None


def test_advantages_of_tokens_are_padded_too():
    by_token = sample(0, completion=3)
    by_token = replace(by_token, advantages=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    single = replace(sample(1, completion=1), advantages=torch.tensor([-1.0], dtype=torch.float64))
    assert loss_batch([by_token, single], CPU).advantages_BT.tolist() == [[1, 2, 3], [-1, 0, 0]]
