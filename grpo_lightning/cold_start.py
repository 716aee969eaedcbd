"""The policy that a run starts from, made first where it is missing: one command for the whole recipe."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from jsonargparse import Namespace
from yaml import YAMLError, safe_load

from grpo_lightning.checkpointing import check_destination
from grpo_lightning.checkpointing.writing import remove, take_place
from grpo_lightning.types import ConfigurationError

RECORD = "made_by.json"
"""Beside the weights: which config and seed made them."""


def make_missing_policy(policy: Namespace, *, seed: int, is_resumed: bool = False) -> Path | None:
    """Run `fit` on the config that `made_by` names, where the policy's folder is not there yet.

    A folder that another seed, or another text of the config, has made counts as missing: a run is a function of its
    settings, not of what an earlier one left behind. A folder without a record is its user's own, and stays.

    It is a process of its own, so that nothing of it is left in the run that follows. Lightning starts the other ranks
    of a run later than this, so they find the folder; ranks that an outer launcher starts together cannot share it.

    Args:
        policy: Class path and settings of the run's policy source.
        seed: Given to the `fit` that makes the policy.
        is_resumed: Whether the run goes on from a checkpoint, whose reference an existing folder is.

    Returns:
        The policy's folder where one lay there that was made anew: `put_policy_back` or `forget_policy` follows.

    Raises:
        ConfigurationError: The config does not exist, or makes another folder; its `fit` failed, or did not write the
            folder; or what is there is no policy alone.
    """
    settings = policy.get("init_args") or {}
    config, path = settings.get("made_by"), settings.get("path")
    if config is None or path is None:
        return None
    folder = Path(path).expanduser()
    if is_resumed and _is_policy(folder):
        return None
    if not Path(config).is_file():
        if _is_policy(folder):
            return None
        raise ConfigurationError(f"model.policy.made_by: the config {config!r} does not exist.")
    recipe = {"config": sha256(Path(config).read_bytes()).hexdigest(), "seed": seed}
    # What the folder holds after a run that broke off in the middle of making it, nobody knows.
    unfinished = _unfinished(folder)
    if _is_policy(folder) and _recorded(folder) in (None, recipe) and not unfinished.exists():
        return None
    _require_made_there(path, config)
    check_destination(folder, "model.policy.path")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(recipe) + "\n")
    is_anew = _make(path, config, seed)
    unfinished.replace(folder / RECORD)
    return folder if is_anew else None


def put_policy_back(folder: Path) -> None:
    """Let the policy lie in its folder again that `make_missing_policy` has made anew: the run was refused."""
    take_place(_earlier(folder), folder)
    _unfinished(folder).unlink(missing_ok=True)


def forget_policy(folder: Path) -> None:
    """Remove the policy that lay in a folder before `make_missing_policy` made it anew."""
    remove(_earlier(folder))


def _earlier(folder: Path) -> Path:
    """Where a policy waits that is made anew."""
    return folder.with_name(f".{folder.name}.earlier")


def _unfinished(folder: Path) -> Path:
    """The record of what is being made."""
    return folder.with_name(f".{folder.name}.{RECORD}")


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


def _make(path: str, config: str, seed: int) -> bool:
    """Run the `fit`; say whether it has made a policy anew."""
    command = ["fit", "--config", config, "--seed_everything", str(seed)]
    folder = Path(path).expanduser()
    if "LOCAL_RANK" in os.environ:
        raise ConfigurationError(
            f"model.policy.path: the policy {path!r} is to be made by {config!r}, and the ranks of an outer launcher "
            f"cannot share making it.\nMake it first: grpo-lightning {' '.join(command)}"
        )
    is_anew = _is_policy(folder)
    why = "was made by other settings" if is_anew else "is not there yet"
    print(f"The policy {path} {why}. Making it: grpo-lightning {' '.join(command)}", flush=True)
    if is_anew:
        take_place(folder, _earlier(folder))
    try:
        _run(path, config, command)
    except BaseException:
        if is_anew:
            put_policy_back(folder)
        raise
    return is_anew


def _run(path: str, config: str, command: list[str]) -> None:
    exit_code = subprocess.run([sys.executable, "-m", "grpo_lightning", *command], check=False).returncode
    if exit_code:
        raise ConfigurationError(
            f"model.policy.made_by: `fit` on {config!r} ended with exit code {exit_code}; its own message is above."
        )
    if not _is_policy(Path(path).expanduser()):
        raise ConfigurationError(f"model.policy.made_by: `fit` on {config!r} did not write the folder {path!r}.")


def _is_policy(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _recorded(folder: Path) -> dict[str, object] | None:
    """Which config and seed made the folder, where that is known."""
    record = folder / RECORD
    recipe: dict[str, object] | None = json.loads(record.read_text()) if record.is_file() else None
    return recipe
