"""A rollout in the background: its errors, its times, and its way through a checkpoint."""

import pickle
from threading import Event

import pytest

from grpo_lightning.rollout import RolloutAhead, RolloutLostError, ahead
from grpo_lightning.rollout.ahead import merged
from grpo_lightning.types import Completion, FinishReason, Prompt

PROMPTS = [Prompt(index=10 * i, token_ids=(i,), text=str(i), columns={"answer": i}) for i in range(6)]
OF_ITERATION = [PROMPTS[i] for i in (4, 1, 5)]


def completions(*slots):
    """A pair for each slot."""
    return [
        Completion(
            token_ids=(slot, sample),
            sampler_logprobs=(-0.1 * slot, -0.3),
            text=f"{slot} {sample}",
            finish_reason=FinishReason.STOP if sample else FinishReason.EOS,
            weight_version=7,
            loss_mask=(True, False) if sample else None,
        )
        for slot in slots
        for sample in range(2)
    ]


def drawn(draw, slots=(0, 1, 2)):
    return RolloutAhead.drawn_by(draw, iteration=3, prompts=OF_ITERATION, slots=slots)


def test_completions_come_with_their_prompts():
    rollout = drawn(lambda: completions(0, 2), slots=(0, 2)).rollout()
    assert (rollout.iteration, rollout.slots) == (3, (0, 2))
    assert rollout.prompts == (PROMPTS[4], PROMPTS[5])
    assert list(rollout.completions) == completions(0, 2)


@pytest.mark.parametrize("error", [KeyError("in the background"), RolloutLostError("in the background")])
def test_what_is_raised_is_raised_to_who_asks(error):
    def draw():
        raise error

    rollout = drawn(draw)
    with pytest.raises(type(error), match="in the background"):
        rollout.rollout()
    assert rollout.state_dict()["completions"] is None


def test_hidden_is_what_nobody_waited_for(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock, may_end = Clock(), Event()
    monkeypatch.setattr(ahead, "time", clock)

    def draw():
        may_end.wait()
        clock.now += 1.0  # while it is waited for, since the wait has begun by then
        return completions(0, 1, 2)

    def let_it_end(futures, seconds):
        may_end.set()
        futures[0].result()

    monkeypatch.setattr(ahead, "wait", let_it_end)
    rollout = drawn(draw)
    clock.now += 4.0
    rollout.wait()
    rollout.wait()
    assert rollout.hidden_seconds == 4.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shares", [[(0, 1, 2)], [(0, 2), (1,)]], ids=["from one rank", "from two"])
def test_any_number_of_ranks_takes_up_what_any_number_had(shares, world_size):
    state = merged([drawn(lambda slots=slots: completions(*slots), slots).state_dict() for slots in shares])
    state = pickle.loads(pickle.dumps(state))
    for rank in range(world_size):
        slots = tuple(range(rank, 3, world_size))
        found = RolloutAhead.from_state_dict(state, PROMPTS, rank=rank, world_size=world_size)
        assert found.prompts == OF_ITERATION
        rollout = found.rollout()
        assert (rollout.iteration, rollout.slots) == (3, slots)
        assert rollout.prompts == tuple(OF_ITERATION[slot] for slot in slots)
        assert list(rollout.completions) == completions(*slots)


def test_what_one_rank_has_lost_is_lost_to_all():
    def draw():
        raise RolloutLostError("gone")

    state = merged([drawn(lambda: completions(0, 2), (0, 2)).state_dict(), drawn(draw, (1,)).state_dict()])
    with pytest.raises(RolloutLostError, match="the checkpoint has none"):
        RolloutAhead.from_state_dict(state, PROMPTS, rank=0, world_size=1).rollout()


def test_there_is_nothing_but_plain_containers_in_a_checkpoint():
    def check(value):
        if isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                check(part)
        else:
            assert value is None or type(value) in (int, float, str, bool)

    check(drawn(lambda: completions(0, 1, 2)).state_dict())
