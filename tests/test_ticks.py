import pytest

from grpo_lightning.ticks import TickLoader


def test_the_order_of_an_iteration():
    ticks = list(TickLoader(num_iterations=2, num_updates=2, num_microbatches=2))
    assert [(t.update, t.microbatch) for t in ticks] == [(0, 0), (0, 1), (1, 0), (1, 1)] * 2
    assert [t.starts_iteration for t in ticks] == [True, False, False, False] * 2
    assert [t.ends_update for t in ticks] == [False, True, False, True] * 2
    assert [t.ends_iteration for t in ticks] == [False, False, False, True] * 2


def test_a_resumed_loader_goes_on_and_the_next_epoch_is_whole():
    whole = TickLoader(num_iterations=2, num_updates=1, num_microbatches=3)
    iterator = iter(whole)
    yielded = [next(iterator) for _ in range(4)]
    resumed = TickLoader(num_iterations=2, num_updates=1, num_microbatches=3)
    resumed.load_state_dict(whole.state_dict())
    assert yielded + list(resumed) == list(TickLoader(num_iterations=2, num_updates=1, num_microbatches=3))
    assert len(list(resumed)) == 6


@pytest.mark.parametrize("limit", [4, 0.7])
def test_every_epoch_of_a_limited_loader_begins_with_an_iteration(limit):
    loader = TickLoader(num_iterations=3, num_updates=2, num_microbatches=1, limit=limit)
    assert (len(loader), loader.num_taken) == (6, 4)
    for _ in range(2):
        ticks = iter(loader)
        assert [next(ticks).update for _ in range(4)] == [0, 1, 0, 1]
    resumed = TickLoader(num_iterations=3, num_updates=2, num_microbatches=1, limit=limit)
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == 4
