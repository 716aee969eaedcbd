import os
import time

import pytest
import worlds
from lightning.pytorch.plugins.environments import LightningEnvironment

from grpo_lightning.ranks import sum_over_ranks


def _sum(folder, *numbers):
    environment = LightningEnvironment()
    assert environment.creates_processes_externally
    rank = environment.local_rank()
    worlds.torch.distributed.init_process_group("gloo", rank=rank, world_size=len(numbers))
    (total,) = sum_over_ranks([numbers[rank]], num_ranks=len(numbers), device=worlds.torch.device("cpu"))
    (folder / f"sum.{rank}").write_text(str(total))


def _fail_on_the_second(folder):
    if os.environ["LOCAL_RANK"] == "1":
        raise ValueError("the second rank is broken")
    time.sleep(60)


def _hang(folder):
    print(f"rank {os.environ['LOCAL_RANK']} waits", flush=True)
    time.sleep(60)


@pytest.mark.slow
def test_the_ranks_of_a_world_reach_each_other(tmp_path):
    worlds.launch(_sum, tmp_path / "world", 1, 2, 4, num_ranks=3)
    assert [(tmp_path / "world" / f"sum.{rank}").read_text() for rank in range(3)] == ["7.0"] * 3


@pytest.mark.slow
def test_one_that_fails_ends_its_world_and_is_heard(tmp_path):
    with pytest.raises(AssertionError, match=r"log\.1: .*\n(.*\n)*ValueError: the second rank is broken"):
        worlds.launch(_fail_on_the_second, tmp_path, num_ranks=2)


@pytest.mark.slow
def test_a_world_that_does_not_get_on_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "WATCHDOG_SECONDS", 2)
    with pytest.raises(AssertionError, match=r"nothing came for 2 s\nlog\.0: rank 0 waits"):
        worlds.launch(_hang, tmp_path, num_ranks=2)
