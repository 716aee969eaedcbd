"""A group of processes, here threads, of which the first sends tensors to the others."""

import pytest
import torch

from grpo_lightning.rollout.background import in_background
from grpo_lightning.rollout.transfer_group import Meeting, TransferGroup, waiting_store

CPU = torch.device("cpu")
TENSORS = [
    torch.arange(12.0).view(3, 4).T,  # not contiguous
    torch.tensor(0.1, dtype=torch.float64),
    torch.empty(0, 3),
    torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16),
    torch.tensor([True, False]),
    torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),  # which gloo does not know
]


def meeting_at(store, *, size, seconds=20, backend="gloo"):
    return Meeting(
        name="weights", address="127.0.0.1", port=store.port, size=size, backend=backend, seconds=seconds
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_every_member_receives_every_bit(size):
    store = waiting_store("127.0.0.1", seconds=20)
    meeting = meeting_at(store, size=size)

    def receive(rank):
        group = TransferGroup(meeting, rank=rank, device=CPU)
        return [group.receive(list(tensor.shape), tensor.dtype) for tensor in TENSORS]

    members = [in_background(receive, rank) for rank in range(1, size)]
    TransferGroup(meeting, rank=0, device=CPU, store=store).broadcast_all(TENSORS)
    for member in members:
        for received, sent in zip(member.result(20), TENSORS, strict=True):
            assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
            assert torch.equal(received.reshape(-1).view(torch.uint8), sent.contiguous().reshape(-1).view(torch.uint8))


def test_a_member_that_does_not_come_is_waited_for_as_long_as_was_said():
    store = waiting_store("127.0.0.1", seconds=0.5)
    with pytest.raises(RuntimeError):
        TransferGroup(meeting_at(store, size=2, seconds=0.5), rank=0, device=CPU, store=store)


def test_a_member_that_takes_no_part_is_waited_for_as_long_as_was_said():
    store = waiting_store("127.0.0.1", seconds=1)
    meeting = meeting_at(store, size=2, seconds=1)
    member = in_background(TransferGroup, meeting, rank=1, device=CPU)
    first = TransferGroup(meeting, rank=0, device=CPU, store=store)
    with pytest.raises(RuntimeError):
        member.result(20).receive([3], torch.float32)  # that nobody sends
    del first


def test_a_worker_on_a_cpu_is_no_member_of_a_group_of_gpus():
    store = waiting_store("127.0.0.1", seconds=1)
    with pytest.raises(RuntimeError, match="the sender has its weights on a GPU, and worker 1 has its own on cpu"):
        TransferGroup(meeting_at(store, size=2, backend="nccl"), rank=1, device=CPU)
