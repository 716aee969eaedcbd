"""What one rank raises, all raise: here with the other ranks made up; `test_sharded_sync` has real ones."""

import pytest

from grpo_lightning.rollout import agreement
from grpo_lightning.rollout.agreement import is_first_rank, of_first_rank, together
from grpo_lightning.rollout.server import ServerError


@pytest.fixture
def others(monkeypatch):
    """The faults of two other ranks, before and behind this one."""
    faults = [None, None]
    monkeypatch.setattr(agreement, "_of_all_ranks", lambda own: [faults[0], own, faults[1]])
    return faults


def test_a_single_process_speaks_for_itself():
    assert is_first_rank()
    assert of_first_rank("a") == "a"
    with together():
        pass
    with pytest.raises(KeyError, match="own"), together():
        raise KeyError("own")


def test_the_fault_of_another_rank_is_raised(others):
    with together():
        pass
    others[1] = ValueError("theirs")
    with pytest.raises(ValueError, match="theirs"), together():
        pass


def test_of_several_faults_one_that_does_not_pass_is_raised_on_every_rank(others):
    others[0] = ServerError("lost")
    with pytest.raises(ValueError, match="own"), together():
        raise ValueError("own")
    others[1] = KeyError("theirs")
    with pytest.raises(KeyError, match="theirs") as raised, together():
        raise ServerError("own")
    assert str(raised.value.__cause__) == "own"


def test_a_fault_that_cannot_be_sent_is_told():
    class LocalError(Exception):
        pass

    sent = agreement._portable(LocalError("what happened"))
    assert type(sent) is RuntimeError
    assert str(sent) == "LocalError: what happened"
    fault = ValueError("as it is")
    assert agreement._portable(fault) is fault
