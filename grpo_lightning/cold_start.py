"""The policy that a run starts from, made first where it is missing: one command for the whole recipe."""

import os
import subprocess
import sys
from pathlib import Path

from jsonargparse import Namespace

from grpo_lightning.types import ConfigurationError


def make_missing_policy(policy: Namespace, *, seed: int) -> None:
    """Run `fit` on the config that `made_by` names, where the policy's folder is not there yet.

    It is a process of its own, so that nothing of it is left in the run that follows. Lightning starts the other ranks
    of a run later than this, so they find the folder; ranks that an outer launcher starts together cannot share it.

    Args:
        policy: Class path and settings of the run's policy source.
        seed: Given to the `fit` that makes the policy.

    Raises:
        ConfigurationError: The config does not exist, its `fit` failed, or it did not write the folder.
    """
    settings = policy.get("init_args") or {}
    config, path = settings.get("made_by"), settings.get("path")
    if config is None or path is None or _is_policy_folder(path):
        return
    if not Path(config).is_file():
        raise ConfigurationError(f"model.policy.made_by: the config {config!r} does not exist.")
    command = ["fit", "--config", config, "--seed_everything", str(seed)]
    if "LOCAL_RANK" in os.environ:
        raise ConfigurationError(
            f"model.policy.path: the model folder {path!r} does not exist, and the ranks of an outer launcher cannot "
            f"share making it.\nMake it first: grpo-lightning {' '.join(command)}"
        )
    print(f"The policy {path} is not there yet. Making it: grpo-lightning {' '.join(command)}", flush=True)
    exit_code = subprocess.run([sys.executable, "-m", "grpo_lightning", *command], check=False).returncode
    if exit_code:
        raise ConfigurationError(
            f"model.policy.made_by: `fit` on {config!r} ended with exit code {exit_code}; its own message is above."
        )
    if not _is_policy_folder(path):
        raise ConfigurationError(f"model.policy.made_by: `fit` on {config!r} did not write the folder {path!r}.")


def _is_policy_folder(path: str) -> bool:
    return (Path(path).expanduser() / "config.json").is_file()
