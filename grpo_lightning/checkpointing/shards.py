"""A checkpoint in a folder, of which each rank writes its shards, by torch.distributed.checkpoint.

The tensors have the names ``weights.NAME`` and ``optimizer.NAME.STATE``; torch puts their shards together for any other
number of ranks, or whole in one process. What else a checkpoint holds is in `REST`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from grpo_lightning.checkpointing.manifest import IN_FOLDER, content_of, write_manifest
from grpo_lightning.checkpointing.writing import aside, begin, clear, finish_with_policy, save_synced

REST, INDEX = "rest.pt", ".metadata"
"""The checkpoint as one file would have it, without the weights and the states of the optimizer; torch's index."""

FOLDER, TRAINED = "shards_folder", "shards_trained"
"""What is in it besides: once it is read, where it lies; the names of the trained weights, by their numbers."""


def save_shards(path: Path, checkpoint: dict[str, Any], trained: Sequence[str], *, policy: Path | None = None) -> None:
    """Write a checkpoint whole or not at all: each rank its shards, the first one the rest. A collective.

    Args:
        path: The same for all ranks, in a folder that all of them see.
        checkpoint: Lightning's, with this rank's tensors in the weights and the states.
        trained: The names of the trained weights, by their numbers.
        policy: On the first rank, what takes its place with the checkpoint, see `prepare_policy`.
    """
    rank = distributed.get_rank()
    path = path.parent.resolve() / path.name
    if rank == 0:
        clear(path.parent)
        begin(path).mkdir()
    distributed.barrier()
    unfinished = aside(path)
    tensors = {_weight(name): value for name, value in checkpoint["state_dict"].items()}
    for state in checkpoint.get("optimizer_states", ()):
        for number, entries in state["state"].items():
            tensors |= {_state(trained[number], key): value for key, value in entries.items()}
    state_dict_saver.save(tensors, storage_writer=FileSystemWriter(unfinished))
    contents = {file.name: [content_of(file)] for file in unfinished.glob(f"__{rank}_*")}
    if rank == 0:
        contents[INDEX] = [content_of(unfinished / INDEX)]
        rest = save_synced(_rest(checkpoint, trained), unfinished / REST)
        contents[REST] = [replace(rest, global_step=checkpoint.get("global_step"))]
    of_ranks: list[Any] | None = [None] * distributed.get_world_size() if rank == 0 else None
    distributed.gather_object(contents, of_ranks)
    if of_ranks is not None:
        write_manifest(unfinished / IN_FOLDER, {name: c for part in of_ranks for name, c in part.items()})
        finish_with_policy(unfinished, path, policy)
    distributed.barrier()


def read_rest(path: Path, *, weights_only: bool | None = None) -> dict[str, Any]:
    """A checkpoint whose weights have shapes alone, and whose optimizer has no states: `read_into` has the values."""
    rest: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=weights_only)
    weights = {
        key.removeprefix(_weight("")): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in _entries(path).items()
        if key.startswith(_weight(""))
    }
    return {**rest, "state_dict": weights, FOLDER: str(path)}


def read_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Read values into weights: of those that are in shards, this rank's share of the files alone."""
    _read(path, {_weight(name): value for name, value in weights.items()})


def read_states(path: Path, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The states of the optimizer by weight, each in shards as its weight is, and on its device.

    Args:
        path: The checkpoint.
        weights: The trained ones.
    """
    tensors: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    entries = _entries(path)
    for name, weight in weights.items():
        prefix = _state(name, "")
        for key, entry in entries.items():
            if not key.startswith(prefix):
                continue
            dtype = entry.properties.dtype
            is_like_weight = entry.size == weight.shape and weight.dim() > 0
            value = torch.zeros_like(weight, dtype=dtype) if is_like_weight else torch.zeros(entry.size, dtype=dtype)
            states.setdefault(name, {})[key.removeprefix(prefix)] = tensors[key] = value.detach()
    _read(path, tensors)
    return states


def read_whole(path: Path, *, weights_only: bool | None = None) -> dict[str, Any]:
    """The checkpoint as one file would have it, in the memory of this process, which needs no others for it."""
    checkpoint = read_rest(path, weights_only=weights_only)
    weights = {name: torch.empty_like(weight, device="cpu") for name, weight in checkpoint["state_dict"].items()}
    read_weights(path, weights)
    trained = checkpoint.pop(TRAINED)
    states = read_states(path, {name: weights[name] for name in trained})
    del checkpoint[FOLDER]
    for saved in checkpoint.get("optimizer_states", ()):
        saved["state"] = {number: states[name] for number, name in enumerate(trained) if name in states}
    return {**checkpoint, "state_dict": weights}


def _rest(checkpoint: dict[str, Any], trained: Sequence[str]) -> dict[str, Any]:
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    if "optimizer_states" in rest:  # where more than the weights is saved
        rest["optimizer_states"] = [{**state, "state": {}} for state in rest["optimizer_states"]]
    return {**rest, TRAINED: [*trained]}


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    with catch_warnings():
        filterwarnings("ignore", message="torch.distributed is disabled")  # it is not needed
        state_dict_loader.load(tensors, storage_reader=FileSystemReader(path), no_dist=True)


def _entries(path: Path) -> dict[str, TensorStorageMetadata]:
    entries: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return entries


def _weight(name: str) -> str:
    return f"weights.{name}"


def _state(name: str, key: str) -> str:
    return f"optimizer.{name}.{key}"
