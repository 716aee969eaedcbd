import pytest

from grpo_lightning.data import PromptStream
from grpo_lightning.functional.random import permutation
from grpo_lightning.types import ConfigurationError, Prompt, Stream


def prompts(indices):
    return [Prompt(index=i, token_ids=(10 + i,), text=str(i)) for i in indices]


def stream(n=7, seed=3, indices=None):
    return PromptStream(prompts(indices or range(n)), seed=seed)


def drawn(stream, n):
    return [prompt.index for prompt in stream.take(n)]


def order(n, seed, epoch):
    return permutation(n, seed=seed, stream=Stream.PROMPT_ORDER, epoch=epoch).tolist()


def test_epochs_follow_each_other_each_in_its_own_permutation():
    expected = order(7, 3, 0) + order(7, 3, 1) + order(7, 3, 2)
    assert order(7, 3, 0) != order(7, 3, 1)
    assert drawn(stream(), 21) == expected


def test_how_much_is_taken_at_once_does_not_matter():
    pieces = stream()
    assert [i for n in (1, 5, 9, 0, 6) for i in drawn(pieces, n)] == drawn(stream(), 21)


def test_two_ranks_draw_the_same():
    assert drawn(stream(), 20) == drawn(stream(), 20)


def test_another_seed_is_another_order():
    assert drawn(stream(n=50, seed=3), 50) != drawn(stream(n=50, seed=4), 50)


def test_more_than_an_epoch_can_be_taken_at_once():
    counts = [drawn(stream(n=3), 9).count(i) for i in range(3)]
    assert counts == [3, 3, 3]


@pytest.mark.parametrize("cursor", range(16))
def test_a_stream_resumed_anywhere_goes_on_as_if_it_had_not_stopped(cursor):
    whole = stream()
    whole.retire(2)
    before = stream()
    before.retire(2)
    head = drawn(before, cursor)
    resumed = stream()
    resumed.load_state_dict(before.state_dict())
    assert head + drawn(resumed, 20) == drawn(whole, cursor + 20)


def test_a_state_is_plain_and_does_not_change_with_the_stream():
    running = stream()
    running.retire(5)
    running.retire(1)
    running.take(3)
    state = running.state_dict()
    running.retire(0)
    running.take(9)
    fingerprint = state.pop("fingerprint")
    assert isinstance(fingerprint, str)
    assert state == {"epoch": 0, "cursor": state["cursor"], "retired": [1, 5], "num_prompts": 7}


def test_a_retired_prompt_is_skipped_from_then_on():
    running = stream()
    head = drawn(running, 2)
    later = order(7, 3, 0)[4]
    running.retire(later)
    running.retire(head[0])
    rest = [i for i in order(7, 3, 0)[2:] + order(7, 3, 1) if i not in (later, head[0])]
    assert drawn(running, len(rest)) == rest


def test_an_index_is_the_row_number_even_where_rows_were_dropped():
    # Rows 0, 1 and 2 were dropped: the prompt of index 4 stands in place 1.
    running = stream(indices=[3, 4, 5, 6])
    running.retire(4)
    assert set(drawn(running, 9)) == {3, 5, 6}


def test_an_unknown_index_cannot_be_retired():
    with pytest.raises(ValueError, match="no training prompt has the index 7"):
        stream().retire(7)


def test_a_stream_of_retired_prompts_says_so_instead_of_running_for_ever():
    running = stream(n=3)
    for i in range(3):
        running.retire(i)
    with pytest.raises(ConfigurationError, match=r"data: all 3 prompts of the train split have been retired"):
        running.take(1)


def test_no_prompts_are_a_mistake():
    with pytest.raises(ConfigurationError, match="the train split has no prompts"):
        PromptStream([], seed=0)


@pytest.mark.parametrize(
    "other",
    [
        PromptStream(prompts(range(6)), seed=3),
        PromptStream(prompts(range(1, 8)), seed=3),
        PromptStream(prompts(range(7)), seed=4),
        PromptStream([*prompts(range(6)), Prompt(index=6, token_ids=(99,), text="6")], seed=3),
    ],
    ids=["fewer", "other rows", "another seed", "another text"],
)
def test_other_data_cannot_be_resumed_on(other):
    with pytest.raises(ConfigurationError) as error:
        other.load_state_dict(stream().state_dict())
    message = str(error.value)
    assert "data: the train split" in message
    assert "(7 prompts)" in message
    assert len(message.splitlines()) <= 3


def test_where_one_prompt_ends_and_the_next_begins_is_part_of_the_fingerprint():
    # Prompts 0 and 5, and prompts 0 and 7: the numbers alone, one after the other, are 0 1 5 7 9 both times.
    short = [Prompt(index=0, token_ids=(1,), text=""), Prompt(index=5, token_ids=(7, 9), text="")]
    long = [Prompt(index=0, token_ids=(1, 5), text=""), Prompt(index=7, token_ids=(9,), text="")]
    states = [PromptStream(cut, seed=0).state_dict() for cut in (short, long)]
    assert states[0]["fingerprint"] != states[1]["fingerprint"]


def test_others_differ_from_each_other_and_from_those_taken():
    some = stream(5)
    first = {prompt.index for prompt in some.take(4)}
    assert some.num_others(first) == 1
    others = some.take_others(1, than=first)  # the fifth of the epoch
    assert not {prompt.index for prompt in others} & first
    # Into the next epoch, whose order may begin with those taken before.
    again = some.take_others(3, than={0, 1})
    assert sorted(prompt.index for prompt in again) == [2, 3, 4]


def test_the_retired_are_no_others():
    some = stream(5)
    some.retire(3)
    assert some.num_others({0}) == 3
    assert sorted(prompt.index for prompt in some.take_others(3, than={0})) == [1, 2, 4]


def test_an_epoch_that_ends_in_the_middle_repeats_nothing():
    for seed in range(20):
        some = PromptStream(prompts(range(7)), seed=seed)
        for _ in range(5):
            taken = [prompt.index for prompt in some.take_distinct(5)]
            assert len(set(taken)) == 5


def test_where_nothing_is_repeated_distinct_prompts_are_the_next_ones():
    one, other = stream(6), stream(6)
    assert [one.take(3) for _ in range(6)] == [other.take_distinct(3) for _ in range(6)]


def test_fewer_prompts_than_are_asked_for_come_again():
    some = stream(5)
    some.retire(3)
    taken = [prompt.index for prompt in some.take_distinct(8)]
    assert sorted(taken) == [0, 0, 1, 1, 2, 2, 4, 4]
