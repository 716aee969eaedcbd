"""Where a stopped run's state goes, such that the run goes on from it."""

import signal
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector as _Connector
from lightning.pytorch.utilities import rank_zero_info


def save_and_say(trainer: Trainer, signum: int) -> None:
    """Save the state of a run that was asked to stop, and say where. A collective.

    It becomes the checkpoint ``last`` beside the others. Under SLURM with Lightning's requeueing it is the one that a
    requeued job looks for, and the signal that announces the end of the job's time requeues it.

    Args:
        trainer: Of the run.
        signum: Of the signal that it was asked with.
    """
    requeueing = requeueing_environment(trainer)
    if requeueing is not None and signum == requeueing.requeue_signal:
        trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]
        return
    path = _last(trainer) if requeueing is None else Path(_Connector.hpc_save_path(trainer.default_root_dir))
    if path is None:
        rank_zero_info("Stopped. Nothing was saved: the run has no ModelCheckpoint.")
        return
    trainer.save_checkpoint(path)
    rank_zero_info(f"Stopped by {signal.Signals(signum).name}. To go on: --ckpt_path {path}")


def requeueing_environment(trainer: Trainer) -> SLURMEnvironment | None:
    """SLURM's, where Lightning requeues jobs."""
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def _last(trainer: Any) -> Path | None:
    """What ``--ckpt_path last`` finds; None where the run saves nothing."""
    callback = trainer.checkpoint_callback
    if trainer.fast_dev_run or not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
        return None
    name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    path = Path(callback.last_model_path or Path(callback.dirpath) / name)
    if trainer.is_global_zero and path.is_symlink():
        path.unlink()  # `save_last: link`: the checkpoint that it leads to stays as it is
    callback.last_model_path = str(path)  # when the run goes on, it overwrites this one
    return path
