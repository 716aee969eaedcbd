"""The way of many plain numbers to the loggers."""

from collections.abc import Mapping
from typing import Any

import torch


def log_metrics(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Log one update's metrics, which are the same on every rank, and show them to the callbacks.

    `LightningModule.log` keeps a torchmetrics object per name, and walks through all of them after every micro-batch:
    with dozens of metrics that costs more than the rest of a small update. These are finished, so they take the way of
    Lightning's own `LearningRateMonitor`: straight to the connector, every `log_every_n_steps` updates.

    Args:
        trainer: Lightning's, in the middle of a fit.
        metrics: By name.
    """
    values = torch.tensor(list(metrics.values()), dtype=torch.float64).unbind()
    trainer.callback_metrics.update(zip(metrics, values, strict=True))
    connector = trainer._logger_connector
    if connector.should_update_logs or trainer.fast_dev_run:
        connector.log_metrics(dict(metrics))
