"""Three ranks that watch each other, each a thread here instead of a process."""

import socket
import threading
from types import SimpleNamespace

import pytest

from grpo_lightning.ending import link as link_module
from grpo_lightning.ending.link import SILENT_SECONDS, Member, connect, listen
from grpo_lightning.ending.watch import SETTLE_SECONDS, Watch

WAIT_SECONDS = 20


class Rank:
    """A rank, and what it has been told."""

    def __init__(self, me, link, server, token):
        self.heard, self.news = [], threading.Semaphore(0)
        self.link = link
        self.watch = Watch(
            me,
            link,
            on_death=self._note,
            on_failure=self._note,
            on_stop=self._note,
            server=server,
            token=token,
        )
        self.watch.start()

    def _note(self, news):
        self.heard.append(news)
        self.news.release()

    def wait(self):
        """Until there is news; what it is."""
        assert self.news.acquire(timeout=WAIT_SECONDS), "nothing was heard"
        return self.heard[-1]


def members(number):
    return [Member(rank, f"node{rank}", 100 + rank) for rank in range(number)]


@pytest.fixture
def ranks():
    first, *others = members(3)
    server, address = listen(None, first)
    made = [Rank(first, None, server, address.token)]
    made += [Rank(me, connect(address, me), None, address.token) for me in others]
    made[0].address = address
    while sum(link.member is not None for link in made[0].watch.links) < 2:
        threading.Event().wait(0.01)
    yield made
    for rank in made:
        for link in rank.watch.links:
            link.has_left = True
    threads = [threading.Thread(target=rank.watch.leave) for rank in made if rank.watch.is_alive()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=WAIT_SECONDS)


def die(rank):
    """What the operating system does to the connections of a process that is killed."""
    for link in rank.watch.links:
        link.connection.shutdown(socket.SHUT_RDWR)


def test_all_others_are_told_who_has_died(ranks):
    die(ranks[1])
    told = "rank 1 (host node1, process 101) has died"
    assert (ranks[0].wait(), ranks[2].wait()) == (told, told)


def test_the_death_of_the_first_rank_is_seen_by_all(ranks):
    die(ranks[0])
    told = "rank 0 (host node0, process 100) has died"
    assert (ranks[1].wait(), ranks[2].wait()) == (told, told)


def test_a_failure_is_told_to_the_others_with_its_first_line(ranks):
    ranks[2].watch.tell_failure(OSError("no space\nleft"))
    told = "rank 2 (host node2, process 102) failed with OSError: no space"
    assert (ranks[0].wait(), ranks[1].wait()) == (told, told)
    assert not ranks[2].heard


def test_who_has_told_a_failure_may_die(ranks):
    ranks[1].watch.tell_failure(OSError("no space"))
    ranks[0].wait()
    die(ranks[1])
    die(ranks[2])
    assert ranks[0].wait() == "rank 2 (host node2, process 102) has died"
    assert len(ranks[0].heard) == 2


def test_a_failure_that_follows_from_a_death_is_not_told_in_its_place(ranks):
    """Gloo breaks off at the moment in which the connection here closes: a death is heard before a failure is told."""
    failing = threading.Thread(target=ranks[2].watch.tell_failure, args=[RuntimeError("connection closed by peer")])
    failing.start()
    die(ranks[1])
    failing.join(timeout=SETTLE_SECONDS + WAIT_SECONDS)
    ranks[0].wait()
    told = "rank 1 (host node1, process 101) has died"
    assert ranks[0].heard[0] == ranks[2].heard[0] == told


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_is_told_to_the_others(ranks, asked):
    ranks[asked].watch.tell_stop(10)
    others = [rank for rank in ranks if rank is not ranks[asked]]
    assert [rank.wait() for rank in others] == [10, 10]
    assert not ranks[asked].heard


def test_the_first_rank_leaves_last(ranks):
    leaving = threading.Thread(target=ranks[0].watch.leave)
    leaving.start()
    ranks[1].watch.leave()
    leaving.join(timeout=0.2)
    assert leaving.is_alive()
    ranks[2].watch.leave()
    leaving.join(timeout=WAIT_SECONDS)
    assert not leaving.is_alive()
    assert not any(rank.heard for rank in ranks)


def test_the_first_rank_that_waits_to_leave_hears_of_a_death(ranks):
    leaving = threading.Thread(target=ranks[0].watch.leave)
    leaving.start()
    die(ranks[2])
    assert ranks[0].wait() == ranks[1].wait() == "rank 2 (host node2, process 102) has died"
    ranks[1].watch.leave()
    leaving.join(timeout=WAIT_SECONDS)
    assert not leaving.is_alive()


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b'{"died": "rank 1"}\n', b'{"hello": [1, "x", 1], "token": "no"}\n']
)
def test_a_stranger_is_not_listened_to(ranks, said):
    with socket.create_connection(ranks[0].address[:2]) as stranger:
        stranger.sendall(said)
    ranks[1].watch.tell_stop(15)
    assert ranks[0].wait() == 15
    assert ranks[0].heard == [15]


def test_a_machine_that_does_not_answer_is_named(ranks, monkeypatch):
    def no_answer(self):
        raise TimeoutError("timed out")

    monkeypatch.setattr(link_module.Link, "receive", no_answer)
    ranks[0].watch.links[0].connection.shutdown(socket.SHUT_RD)
    assert ranks[0].wait().endswith(f"has not been heard of for {SILENT_SECONDS} s")


def test_a_silent_machine_is_asked_within_its_time():
    """Idle time and the questions after it: as many seconds as are promised."""
    settings = {}
    connection = SimpleNamespace(setsockopt=lambda level, name, value: settings.__setitem__((level, name), value))
    link_module.ask_when_silent(connection)
    tcp = [
        settings[socket.IPPROTO_TCP, name] for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    ]
    idle, every, number = tcp
    assert idle + every * number == SILENT_SECONDS == settings[socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT] / 1000
    assert settings[socket.SOL_SOCKET, socket.SO_KEEPALIVE] == 1
