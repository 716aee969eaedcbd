"""Where a policy may be written: nothing is lost that is not a policy."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from grpo_lightning.types import ConfigurationError

_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.safetensors")
_OTHERS = (
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "base_checksum.json",
    "made_by.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)


def check_destination(folder: Path, key: str) -> None:
    """A policy's folder can be written there: there is nothing, an empty folder, or a policy and nothing else.

    Args:
        folder: Of the policy.
        key: What names it in the settings.

    Raises:
        ConfigurationError: What is there would be lost; or nothing can be written there, or it is the current folder or
            one above it.
    """
    here = Path.cwd()
    if folder.name in ("", "..") or folder.resolve() in (here, *here.parents):
        raise ConfigurationError(f"{key} must name a folder of its own, got {str(folder)!r}.")
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise ConfigurationError(f"{key}: {str(folder)!r} cannot be written, since {above} is no folder.")
    is_there = os.path.lexists(folder)
    if is_there and not folder.is_dir():
        raise ConfigurationError(f"{key}: {str(folder)!r} is there already, and is no folder.")
    for path in (above, folder) if is_there else (above,):
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigurationError(f"{key}: {str(folder)!r} cannot be written: {path} is not writable.")
    if is_there:
        _require_policy(folder, key)


def _require_policy(folder: Path, key: str) -> None:
    """Refuse a folder that is neither empty nor a policy's."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not _is_any(name, (*_CONFIGS, *_WEIGHTS, *_OTHERS))]
    if names and not foreign and not all(any(_is_any(n, kind) for n in names) for kind in (_CONFIGS, _WEIGHTS)):
        foreign = names
    if foreign:
        raise ConfigurationError(
            f"{key}: the folder {str(folder)!r} holds what would be lost: {', '.join(foreign[:5])}.\n"
            "Name another folder, or move its files away."
        )


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
