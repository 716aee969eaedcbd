"""The policy that a run starts from, made first where it is missing: one command for the whole recipe."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from jsonargparse import Namespace
from yaml import YAMLError, safe_load

from grpo_lightning.types import ConfigurationError

RECORD = "made_by.json"
"""Beside the weights: which config and seed made them."""


def make_missing_policy(policy: Namespace, *, seed: int, is_resumed: bool = False) -> None:
    """Run `fit` on the config that `made_by` names, where the policy's folder is not there yet.

    A folder that another seed, or another text of the config, has made counts as missing: a run is a function of its
    settings, not of what an earlier one left behind. A folder without a record is its user's own, and stays.

    It is a process of its own, so that nothing of it is left in the run that follows. Lightning starts the other ranks
    of a run later than this, so they find the folder; ranks that an outer launcher starts together cannot share it.

    Args:
        policy: Class path and settings of the run's policy source.
        seed: Given to the `fit` that makes the policy.
        is_resumed: Whether the run goes on from a checkpoint, whose reference an existing folder is.

    Raises:
        ConfigurationError: The config does not exist, or makes another folder; its `fit` failed, or did not write the
            folder.
    """
    settings = policy.get("init_args") or {}
    config, path = settings.get("made_by"), settings.get("path")
    if config is None or path is None:
        return
    folder = Path(path).expanduser()
    if is_resumed and _is_policy(folder):
        return
    if not Path(config).is_file():
        if _is_policy(folder):
            return
        raise ConfigurationError(f"model.policy.made_by: the config {config!r} does not exist.")
    recipe = {"config": sha256(Path(config).read_bytes()).hexdigest(), "seed": seed}
    # What the folder holds after a run that broke off in the middle of making it, nobody knows.
    unfinished = folder.with_name(f".{folder.name}.{RECORD}")
    if _is_policy(folder) and _recorded(folder) in (None, recipe) and not unfinished.exists():
        return
    _require_made_there(path, config)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(recipe) + "\n")
    _make(path, config, seed)
    unfinished.replace(folder / RECORD)


def _require_made_there(path: str, config: str) -> None:
    """The config writes the policy to that folder, as far as it says so itself."""
    try:
        content = safe_load(Path(config).read_text())
    except YAMLError as error:
        raise ConfigurationError(f"model.policy.made_by: the config {config!r} is not YAML: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    model = model if isinstance(model, dict) else {}
    export_to = {**model, **(model.get("init_args") or {})}.get("export_to")
    if isinstance(export_to, str) and Path(export_to).expanduser().resolve() != Path(path).expanduser().resolve():
        raise ConfigurationError(
            f"model.policy.path: {config!r} (model.policy.made_by) does not make {path!r}, but {export_to!r} "
            "(its model.export_to)."
        )


def _make(path: str, config: str, seed: int) -> None:
    command = ["fit", "--config", config, "--seed_everything", str(seed)]
    folder = Path(path).expanduser()
    if "LOCAL_RANK" in os.environ:
        raise ConfigurationError(
            f"model.policy.path: the policy {path!r} is to be made by {config!r}, and the ranks of an outer launcher "
            f"cannot share making it.\nMake it first: grpo-lightning {' '.join(command)}"
        )
    why = "was made by other settings" if _is_policy(folder) else "is not there yet"
    print(f"The policy {path} {why}. Making it: grpo-lightning {' '.join(command)}", flush=True)
    before = _written(folder)
    exit_code = subprocess.run([sys.executable, "-m", "grpo_lightning", *command], check=False).returncode
    if exit_code:
        raise ConfigurationError(
            f"model.policy.made_by: `fit` on {config!r} ended with exit code {exit_code}; its own message is above."
        )
    if _written(folder) == before:
        raise ConfigurationError(f"model.policy.made_by: `fit` on {config!r} did not write the folder {path!r}.")


def _is_policy(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _written(folder: Path) -> int | None:
    """When the folder's policy was written, in nanoseconds."""
    return (folder / "config.json").stat().st_mtime_ns if _is_policy(folder) else None


def _recorded(folder: Path) -> dict[str, object] | None:
    """Which config and seed made the folder, where that is known."""
    record = folder / RECORD
    recipe: dict[str, object] | None = json.loads(record.read_text()) if record.is_file() else None
    return recipe
