"""Files and folders that are written aside, and take their place when they are whole.

What is not whole yet lies in a folder ``.unfinished`` beside: nobody who looks for checkpoints takes it for one, and
the next one that is written clears away what a run has left that was killed.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch

from grpo_lightning.checkpointing.destination import check_destination
from grpo_lightning.checkpointing.manifest import (
    IN_FOLDER,
    Content,
    content_of,
    manifest_of,
    read_manifest,
    write_manifest,
)

UNFINISHED, REPLACED, TORN = ".unfinished", ".replaced", ".torn"
WITH = "+policy"
"""Ends the name of a policy that is whole, and takes its place when the checkpoint of that name has taken its own."""

PREPARED: set[Path | None] = set()
"""Policies that this process has written aside for checkpoints that it is about to write."""

_NUMBERS = count()

ONE_AT_A_TIME = Lock()
"""Of the threads of a process: a checkpoint may be written behind a run's back, and clears away what is unfinished."""


def aside(path: Path) -> Path:
    """Where that lies which is to take its place at `path`."""
    return path.parent / UNFINISHED / path.name


def begin(path: Path) -> Path:
    """Make room for it."""
    unfinished = aside(path)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    remove(unfinished)
    return unfinished


def clear(folder: Path) -> None:
    """Clear away what a killed run has left of checkpoints in a folder.

    One in a folder of its own that was whole, and only had to take its place, takes it; so does one that was put aside
    for something that has not taken its place. A policy takes its place if its checkpoint had taken its own.
    """
    rests = [rest for rest in (folder / UNFINISHED).glob("*") if rest not in PREPARED]
    removed = set()
    for rest in sorted(rests, key=lambda rest: (rest.name.endswith(REPLACED), rest.name.endswith(WITH))):
        name = rest.name.removesuffix(REPLACED).removesuffix(WITH)
        if rest.name.endswith(WITH):
            place, is_due = policy_folder(folder / name), name not in removed
        else:
            place = folder / name
            is_due = (rest.name.endswith(REPLACED) or (rest / IN_FOLDER).is_file()) and not place.exists()
        if is_due:
            take_place(rest, place)
        else:
            remove(rest)
            removed.add(rest.name)


def finish(unfinished: Path, path: Path) -> None:
    """Let it take its place, whatever is there."""
    replaced = unfinished.with_name(path.name + REPLACED)
    if path.is_dir() and not path.is_symlink():
        path.rename(replaced)
    elif unfinished.is_dir():
        path.unlink(missing_ok=True)
        remove(path.with_name(f"{path.name}.{IN_FOLDER}"))  # of the file
    unfinished.replace(path)
    _sync(path.parent)
    remove(replaced)
    with suppress(OSError):  # there may be others
        unfinished.parent.rmdir()


def finish_with_policy(unfinished: Path, path: Path, prepared: Path | None) -> None:
    """Let a checkpoint take its place, and the policy that was prepared for it: at no moment do both lie there unlike.

    The policy before is put aside first. `clear` brings it back where the checkpoint has not taken its place.

    Args:
        unfinished: The checkpoint, whole.
        path: Its place.
        prepared: See `prepare_policy`; None where there is none.
    """
    if prepared is None:
        finish(unfinished, path)
        return
    place, rests = policy_folder(path), aside(path).parent
    whole, replaced = rests / f"{path.name}{WITH}", rests / f"{place.name}{REPLACED}"
    prepared.rename(whole)
    PREPARED.discard(prepared)
    if place.exists():
        place.rename(replaced)
    finish(unfinished, path)
    take_place(whole, place)
    remove(replaced)
    with suppress(OSError):  # there may be others
        rests.rmdir()


def prepare_policy(checkpoint: Path, write: Callable[[Path], None]) -> Path:
    """Write a policy aside, which takes its place with its checkpoint.

    Args:
        checkpoint: Where the checkpoint is to lie.
        write: Writes a folder.

    Returns:
        Where the policy is.
    """
    checkpoint = checkpoint.parent.resolve() / checkpoint.name
    with ONE_AT_A_TIME:
        unfinished = begin(checkpoint.with_name(f"{next(_NUMBERS)}+{policy_folder(checkpoint).name}"))
        write(unfinished)
        PREPARED.add(unfinished)
    return unfinished


def policy_folder(checkpoint: Any) -> Path:
    """Where the policy of a checkpoint lies: ``last.ckpt`` has ``last.policy``."""
    return Path(checkpoint).with_suffix(".policy")


def take_place(whole: Path, place: Path) -> None:
    """Rename a folder to what may be there already, which is removed."""
    remove(place)
    whole.rename(place)


def remove(path: Path) -> None:
    """Remove a file, a folder or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_torn_aside(checkpoint: Path) -> Path:
    """Let a torn checkpoint make room for the next one of its name, without loss.

    Returns:
        Where it lies now, with its manifest.
    """
    torn = checkpoint.with_name(checkpoint.name + TORN)
    remove(torn)
    manifests = [path.with_name(f"{path.name}.{IN_FOLDER}") for path in (checkpoint, torn)]
    remove(manifests[1])
    if manifests[0].is_file():
        manifests[0].rename(manifests[1])
    checkpoint.rename(torn)
    return torn


def write_whole(folder: Path, write: Callable[[Path], None], *, key: str = "the policy's folder") -> None:
    """Write a policy's folder whole or not at all.

    Args:
        folder: Where to.
        write: Writes a folder.
        key: What names the folder in the settings.

    Raises:
        ConfigurationError: See `check_destination`.
    """
    with ONE_AT_A_TIME:
        check_destination(folder, key)
        unfinished = begin(folder)
        write(unfinished)
        finish(unfinished, folder)


def write_file(content: Any, path: Path, *, global_step: int | None = None, policy: Path | None = None) -> None:
    """Write what `torch.load` reads, and its manifest, whole or not at all.

    Until the file has taken its place, the manifest allows what is there too: at every moment they agree.

    Args:
        content: What to save.
        path: Of the file.
        global_step: The optimizer steps behind it, for the manifest.
        policy: Which takes its place with it, see `prepare_policy`.
    """
    path = path.parent.resolve() / path.name
    with ONE_AT_A_TIME, _forgotten(policy):
        clear(path.parent)
        unfinished = begin(path)
        written = replace(save_synced(content, unfinished), global_step=global_step)
        before = [_present_content(path)] if path.is_file() and not path.is_symlink() else []
        manifest = path.with_name(f"{path.name}.{IN_FOLDER}")
        write_manifest(manifest, {path.name: [written, *before]})
        finish_with_policy(unfinished, path, policy)
        if before:
            write_manifest(manifest, {path.name: [written]})


@contextmanager
def _forgotten(policy: Path | None) -> Iterator[None]:
    """At the end, a policy that has not taken its place may be cleared away."""
    try:
        yield
    finally:
        PREPARED.discard(policy)


def save_synced(content: Any, path: Path) -> Content:
    """`torch.save` to the disk itself, not to a cache of it alone. Returns what was written."""
    with path.open("wb") as file:
        hashed = _Hashed(file)
        torch.save(content, hashed)  # type: ignore[arg-type]  # it is asked to write and to flush alone
        file.flush()
        os.fsync(file.fileno())
    return hashed.content


def _present_content(path: Path) -> Content:
    """What the manifest says that a file holds; where that leaves a doubt, the file is read."""
    manifest = manifest_of(path)
    contents = read_manifest(manifest) if manifest.exists() else None
    allowed = (contents or {}).get(path.name, ())
    if len(allowed) == 1:
        return allowed[0]
    present = content_of(path)
    return next((content for content in allowed if content == present), present)


def _sync(folder: Path) -> None:
    """Make the names in a folder outlast a failure of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Hashed:
    """A file that is written from its beginning to its end, and hashed on the way: it is never held whole.

    Args:
        file: Where the bytes go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Write and count."""
        self._hash.update(data)
        self._size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Pass it on."""
        self._file.flush()

    @property
    def content(self) -> Content:
        """What was written."""
        return Content(self._size, self._hash.hexdigest())
