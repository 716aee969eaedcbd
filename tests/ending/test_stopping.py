import copy
import os
import signal
import threading
import time

import pytest
import torch

from grpo_lightning.ending import StoppedRun, Stopping
from grpo_lightning.ending import stopping as stopping_module


@pytest.fixture
def told():
    return []


@pytest.fixture
def stopping(told):
    stopping = Stopping()
    before = {signum: signal.signal(signum, stopping.on_signal) for signum in (signal.SIGTERM, signal.SIGINT)}
    stopping.begin(None, told.append)
    yield stopping
    for signum, handler in before.items():
        signal.signal(signum, handler)


def kill(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


def send_later(stopping, seconds=0.2):
    thread = threading.Timer(seconds, stopping.on_news, [signal.SIGTERM])
    thread.start()
    return thread


def test_nothing_happens_unasked(stopping):
    stopping.check()
    assert stopping.unless_stopped(lambda: 3, can_break_off=True) == 3


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_where_ranks_come_by(stopping, told, signum, status):
    kill(signum)
    with pytest.raises(StoppedRun) as stopped:
        stopping.check()
    assert (stopped.value.code, stopped.value.signum) == (status, signum)
    assert told == [signum]


def test_work_is_broken_off(stopping):
    def work():
        kill()
        raise AssertionError("went on")

    with pytest.raises(StoppedRun):
        stopping.unless_stopped(work, can_break_off=True)


def test_work_that_takes_every_exception_for_its_own_is_broken_off(stopping):
    """As rewards are asked, one completion after another."""
    begun = []

    def rewards():
        for completion in range(3):
            begun.append(completion)
            try:
                kill()
            except Exception:
                continue

    with pytest.raises(StoppedRun):
        stopping.unless_stopped(rewards, can_break_off=True)
    assert begun == [0]


def test_work_that_swallows_everything_ends_the_run_all_the_same(stopping):
    def work():
        try:
            kill()
        except BaseException:
            return 1

    with pytest.raises(StoppedRun):
        stopping.unless_stopped(work, can_break_off=True)


def test_no_work_is_begun_when_the_run_is_to_stop(stopping):
    kill()
    with pytest.raises(StoppedRun):
        stopping.unless_stopped(lambda: pytest.fail("was begun"), can_break_off=True)


def test_outside_of_such_work_nothing_is_broken_off(stopping):
    kill()
    time.sleep(0.01)
    assert stopping.signum == signal.SIGTERM


def test_the_error_of_work_is_its_own(stopping):
    def work():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        stopping.unless_stopped(work, can_break_off=True)
    kill()  # and nothing is broken off any more


def test_news_of_another_ranks_signal_wakes_a_sleeping_one(stopping, told):
    thread = send_later(stopping)
    since = time.monotonic()
    with pytest.raises(StoppedRun):
        stopping.unless_stopped(lambda: time.sleep(60), can_break_off=True)
    assert time.monotonic() - since < 30
    assert told == [], "who hears it from others does not tell them"
    thread.join()


def test_no_news_after_the_end(stopping):
    stopping.end()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    send_later(stopping, 0).join()
    assert not stopping.signum


def test_a_second_interrupt_does_not_wait(stopping, monkeypatch):
    kill(signal.SIGINT)
    kill(signal.SIGINT)  # the same press, by another way
    monkeypatch.setattr(stopping_module, "SAME_PRESS_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        kill(signal.SIGINT)


def test_a_second_termination_is_the_same_request(stopping, told):
    kill()
    kill()
    assert told == [signal.SIGTERM]


def test_a_rank_that_others_count_on_finishes_its_work(stopping, monkeypatch):
    """As it begins work that others have begun, too."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, operation: None)
    stopping.begin(torch.device("cpu"), lambda signum: None)
    done = []

    def work():
        kill()
        done.append(True)

    for _ in range(2):
        with pytest.raises(StoppedRun):
            stopping.unless_stopped(work, can_break_off=False)
    assert done == [True, True]
    with pytest.raises(StoppedRun):
        stopping.unless_stopped(work, can_break_off=True)
    assert len(done) == 2


def test_a_rank_alone_breaks_off_whatever_it_does(stopping):
    with pytest.raises(StoppedRun):
        stopping.unless_stopped(lambda: (kill(), pytest.fail("went on")), can_break_off=False)


def test_a_copy_of_a_module_is_stopped_with_it(stopping):
    assert copy.deepcopy(stopping) is stopping
