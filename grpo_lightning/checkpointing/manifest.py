"""What a checkpoint consists of, file by file, so that one that was cut off or damaged is recognised.

The manifest of ``last.ckpt`` is ``last.ckpt.manifest.json`` beside it, or ``manifest.json`` in it where it is a folder.
It gives each file's contents by size and SHA-256: one, or two while a file is being replaced, of which either is whole;
and the optimizer steps behind the checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zipfile import is_zipfile

IN_FOLDER = "manifest.json"


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    size: int
    sha256: str
    global_step: int | None = field(default=None, compare=False)
    """The optimizer steps behind the checkpoint, in one of its files."""


Contents = Mapping[str, Sequence[Content]]
"""By the file's name, what it may hold."""


def manifest_of(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint lies; of a link, that of what it points to."""
    checkpoint = checkpoint.resolve()
    if checkpoint.is_dir():
        return checkpoint / IN_FOLDER
    return checkpoint.with_name(f"{checkpoint.name}.{IN_FOLDER}")


def content_of(file: Path) -> Content:
    """What a file holds: it is read whole."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Content(file.stat().st_size, digest)


def write_manifest(manifest: Path, contents: Contents) -> None:
    """Write a manifest whole or not at all."""
    listed = {name: [_listed(content) for content in allowed] for name, allowed in sorted(contents.items())}
    unfinished = manifest.with_name(f".{IN_FOLDER}.unfinished")
    with unfinished.open("w") as file:
        json.dump({"files": listed}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(manifest)


def read_manifest(manifest: Path) -> Contents | None:
    """What it lists; None where it is unreadable."""
    try:
        files = json.loads(manifest.read_text())["files"]
        return {name: [Content(**content) for content in allowed] for name, allowed in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def step_of(checkpoint: Path) -> int | None:
    """The optimizer steps behind a checkpoint; None where its manifest, if there is one, does not say.

    Where a save was cut off, so that the manifest allows two contents, the file is read.
    """
    manifest = manifest_of(checkpoint)
    contents = read_manifest(manifest) if manifest.is_file() else None
    for name, allowed in (contents or {}).items():
        file = manifest.parent / name
        if len(allowed) > 1 and file.is_file():
            present = content_of(file)
            allowed = [content for content in allowed if content == present]
        if allowed and allowed[0].global_step is not None:
            return allowed[0].global_step
    return None


def problem_of(checkpoint: Path, *, rank: int = 0, num_ranks: int = 1, with_checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a sentence that names the file; None where nothing is found.

    Of a file without a manifest, which cannot be verified, only what is no archive of torch is found.

    Args:
        checkpoint: A file or a folder.
        rank: Which share of the checksums to compare.
        num_ranks: How many shares there are.
        with_checksums: Whether to read the files, or to look at their sizes alone.
    """
    manifest = manifest_of(checkpoint)
    if not manifest.exists():
        return _problem_without_manifest(checkpoint)
    contents = read_manifest(manifest)
    if contents is None:
        return f"{manifest} is damaged: it is not what a manifest looks like."
    folder = manifest.parent
    if not contents or (checkpoint.is_file() and checkpoint.resolve().name not in contents):
        return f"{manifest} is damaged: it does not say what {checkpoint.name} holds."
    sizes = (_wrong_size(folder / name, allowed) for name, allowed in contents.items())
    problem = next(filter(None, sizes), None)
    if problem is not None or not with_checksums:
        return problem
    mine = [*contents.items()][rank::num_ranks]
    return next(filter(None, (_wrong_content(folder / name, allowed) for name, allowed in mine)), None)


def _listed(content: Content) -> dict[str, int | str]:
    return {name: value for name, value in asdict(content).items() if value is not None}


def _problem_without_manifest(checkpoint: Path) -> str | None:
    if checkpoint.is_dir():
        return f"{checkpoint} is torn: it has no {IN_FOLDER}, which is written last."
    if not is_zipfile(checkpoint):
        return f"{checkpoint} is torn, or no checkpoint: its end is not that of a file of torch."
    return None


def _wrong_size(file: Path, allowed: Sequence[Content]) -> str | None:
    if not file.is_file():
        return f"{file} is missing."
    size, sizes = file.stat().st_size, [content.size for content in allowed]
    if size in sizes:
        return None
    return f"{file} is torn: it has {size:,} bytes, and was written with {' or '.join(f'{s:,}' for s in sizes)}."


def _wrong_content(file: Path, allowed: Sequence[Content]) -> str | None:
    if content_of(file) in allowed:
        return None
    return f"{file} is damaged: its bytes are not those that were written (their SHA-256 is another)."
