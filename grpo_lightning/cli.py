"""The command line: `grpo-lightning fit|validate|test|predict|chat|merge|plan`.

The only place where everything meets: what is imported here can be named in YAML by its class name alone.
"""

import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn
from zipfile import is_zipfile

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import grpo_lightning
import grpo_lightning.callbacks
from grpo_lightning import chat, merging, planning
from grpo_lightning.admission import CheckedBeforehand
from grpo_lightning.checkpointing import found_checkpoints, problem_of
from grpo_lightning.cold_start import forget_policy, make_missing_policy, put_policy_back
from grpo_lightning.parse_errors import check_config_files, check_groups, condense, is_of_union
from grpo_lightning.preconditions import check_max_time
from grpo_lightning.resumed import ResumedFromWhole
from grpo_lightning.rollout.server import ServerError
from grpo_lightning.run_folder import has_checkpoints, put_back, set_aside
from grpo_lightning.strategies import name_accelerator
from grpo_lightning.trainer_errors import check_strategy_name, with_key
from grpo_lightning.types import ConfigurationError

OTHER_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "chat": chat.main,
    "merge": merging.main,
    "plan": planning.main,
}
"""Commands that are not the Trainer's."""


def main(args: list[str] | None = None) -> None:
    """Run one command, as in ``main(["fit", "--config", "configs/quickstart.yaml"])``.

    Args:
        args: What follows the program's name on the command line; None takes it from there.

    Raises:
        SystemExit: With code 2 after a user's mistake, whose message is on stderr.
    """
    args = sys.argv[1:] if args is None else args
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # a user's own modules lie in the current folder
    # Lightning 2.6 on torch 2.13; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    # The cold start is judged by the run that it is for.
    warnings.filterwarnings("ignore", message=".*passed in a `val_dataloader` but have no", category=UserWarning)
    # Data without held-out prompts are trained on without validation; a command that needs some refuses them itself.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    name_accelerator()
    with _mistakes_without_traceback():
        _require_command(args)
        if args[0] in OTHER_COMMANDS:
            OTHER_COMMANDS[args[0]](args[1:])
            return
        check_config_files(args)
        _import_named_parts()
        parser_kwargs = {"exit_on_error": False, "allow_abbrev": False}
        _CommandLine(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=_SaveConfigOfFit,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "version": grpo_lightning.__version__,
                "description": "GRPO training of language models. To talk to a policy: grpo-lightning chat --help",
                **parser_kwargs,
                **dict.fromkeys(_CommandLine.subcommands(), parser_kwargs),
            },
            args=args,
        )


class _SaveConfigOfFit(SaveConfigCallback):
    """Leaves the config of `fit` in the run's folder when the run is evaluated: it is what resumes the run.

    Without the checkpoint that a resumed run went on from: whoever reads the config later names a checkpoint, or none.
    Of a run that goes on from one, when the checkpoint has been found to fit: until then the earlier config stays.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        has_found = isinstance(pl_module, ResumedFromWhole) and bool(pl_module.found_checkpoints)
        if stage == "fit" and self.config["ckpt_path"] is None and not has_found:
            self._write(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.already_saved:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.config = self.config.clone()
        self.config["ckpt_path"] = None
        super().setup(trainer, pl_module, "fit")


_MISTAKES = (ConfigurationError, MisconfigurationException, ServerError)
"""What a user can mend, and needs no traceback for."""


class _CommandLine(LightningCLI):
    """Lightning's command line with one seed for everything and the policy made first where it is missing."""

    _earlier: Path | None = None
    """Where the earlier run is that this one has moved."""

    _made_anew: Path | None = None
    """The policy's folder, where another one lay before this run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for owner in ("model", "data"):
            parser.link_arguments(("seed_everything", owner), f"{owner}.init_args.seed", compute_fn=_the_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        check_groups(self.config[self.config.subcommand])

    def _parse_ckpt_path(self) -> None:
        """Leave the settings alone: Lightning would let the checkpoint's win over the command line's, unsaid."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        _require_checkpoint(settings.get("ckpt_path"))
        check_max_time(settings.get("trainer.max_time"))
        check_strategy_name(settings.get("trainer.strategy"))

    def before_fit(self) -> None:
        """Refuse what cannot be run, then make the policy where it is missing; a new run has a folder of its own."""
        checked = self.model if isinstance(self.model, CheckedBeforehand) else None
        if checked is not None:
            checked.check_settings(self.trainer)
        self._make_missing_policy()
        if checked is not None:
            checked.check_inputs(self.trainer, self.datamodule)
        self._set_aside()

    def _make_missing_policy(self) -> None:
        settings = self.config["fit"]
        policy = settings.get("model.init_args.policy")
        if isinstance(policy, Namespace):
            is_resumed = settings.get("ckpt_path") is not None
            seed = int(settings["seed_everything"])
            self._made_anew = make_missing_policy(policy, seed=seed, is_resumed=is_resumed)

    def _set_aside(self) -> None:
        settings = self.config["fit"]
        # Asked of the environment: the strategy does not know its rank yet.
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        if settings.get("ckpt_path") is None and not self._found_checkpoints and is_first:
            in_use = {
                "model.policy.path": settings.get("model.init_args.policy.init_args.path"),
                "model.lora.from_adapter": settings.get("model.init_args.lora.from_adapter"),
            }
            self._earlier = earlier = set_aside(self.trainer, in_use=in_use)
            if earlier is not None:
                print(f"An earlier run was moved to {earlier}. To go on with one, give its --ckpt_path.", flush=True)

    def _run_subcommand(self, subcommand: str) -> None:
        """With the earlier run and its policy where they were, if this one ends before it has stepped or saved."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            self._put_back()
            raise
        finally:
            if self._made_anew is not None:
                forget_policy(self._made_anew)

    def _put_back(self) -> None:
        has_saved = self._earlier is not None and has_checkpoints(self._earlier)
        if self.trainer.global_step or has_saved:
            return
        if self._made_anew is not None:
            put_policy_back(self._made_anew)
            print(f"The policy {self._made_anew} is what it was before: this run has not begun.", flush=True)
            self._made_anew = None
        if self._earlier is not None:
            put_back(self._earlier)
            print("The earlier run was moved back: this one has not begun.", flush=True)

    @cached_property
    def _found_checkpoints(self) -> list[Path]:
        return found_checkpoints(self.trainer, self.config[self.subcommand].get("ckpt_path"))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """With the newest checkpoint of those that were found; the model skips what of them is torn."""
        settings = super()._prepare_subcommand_kwargs(subcommand)
        if self._found_checkpoints and isinstance(self.model, ResumedFromWhole):
            self.model.found_checkpoints = self._found_checkpoints
            settings["ckpt_path"] = str(self._found_checkpoints[0])
        return settings

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            raise with_key(error) from error


def _require_command(args: list[str]) -> None:
    commands = [*_CommandLine.subcommands(), *OTHER_COMMANDS]
    if not args or (args[0] not in commands and not args[0].startswith("-")):
        got = repr(args[0]) if args else "none"
        raise ConfigurationError(f"The first word must be a command ({', '.join(commands)}), got {got}.")


def _the_seed(seed_everything: bool | int, owner: Namespace | None) -> int:
    """The value of `model.seed` and `data.seed`, which are `seed_everything` and nothing else."""
    if isinstance(seed_everything, bool) or not 0 <= seed_everything < 2**32:
        raise ConfigurationError(f"seed_everything must be a whole number in [0, 2**32), got {seed_everything}.")
    given = (owner.get("init_args.seed") if owner else None) or seed_everything
    if given != seed_everything:
        raise ConfigurationError(
            f"model.seed and data.seed follow seed_everything ({seed_everything}), got {given}: set seed_everything."
        )
    return seed_everything


def _require_checkpoint(path: str | None) -> None:
    """Look at the checkpoint before anything long begins; its tensors are mapped, not read."""
    if path == "best":
        raise ConfigurationError(
            "ckpt_path: a checkpoint is the best within a run alone, and this command begins one, got 'best'.\n"
            "Set it to the path of the best one's file (its ModelCheckpoint has a `monitor`), or to last."
        )
    if path in (None, "last", "hpc", "registry") or path.startswith("registry:"):
        return
    if not Path(path).exists():
        raise ConfigurationError(f"ckpt_path: the checkpoint {path!r} does not exist.")
    if (problem := problem_of(Path(path), with_checksums=False)) is not None:
        raise ConfigurationError(f"ckpt_path: {problem}")
    if Path(path).is_file() and not (is_zipfile(path) and _is_of_lightning(path)):
        raise ConfigurationError(f"ckpt_path: {path!r} is not a checkpoint of Lightning.")


def _is_of_lightning(path: str) -> bool:
    try:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except UnpicklingError:  # holds classes of its user's; whether they may be loaded is not asked here
        return True
    return isinstance(content, dict) and "pytorch-lightning_version" in content


def _import_named_parts() -> None:
    """Import what a config may name, since a short class name is found among imported classes only."""
    for package in (grpo_lightning, grpo_lightning.callbacks):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if module.ispkg or package is grpo_lightning.callbacks:
                importlib.import_module(module.name)


@contextmanager
def _mistakes_without_traceback() -> Iterator[None]:
    """Print a user's mistake in at most three lines, once over all ranks, and exit with code 2."""
    try:
        yield
    except Exception as error:
        mistake = _mistake_in(error)
        if mistake is not None:
            _exit(str(mistake))
        if isinstance(error, ArgumentError) or is_of_union(error):
            _exit(condense(str(error)))
        raise


def _mistake_in(error: BaseException) -> BaseException | None:
    return next((cause for cause in _causes(error) if isinstance(cause, _MISTAKES)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: jsonargparse wraps what a constructor raises."""
    while error is not None:
        yield error
        error = error.__cause__


def _exit(message: str) -> NoReturn:
    lines = [line for line in message.strip().splitlines() if line.strip()]
    rank_zero_only(print)("error: " + "\n".join(lines[:3]), file=sys.stderr)
    raise SystemExit(2)
