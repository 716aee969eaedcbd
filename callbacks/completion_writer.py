"""Observer: what `predict` draws, in a file."""

import json
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from grpo_lightning.run_folder import run_folder


class CompletionWriter(Callback):
    """Writes what `predict` draws to the run's folder, one JSON object per prompt and line, as it is drawn.

    The file is ``completions.jsonl``, of several ranks ``completions.<rank>.jsonl`` each. A line has a prompt's number
    ``slot``, the ``prompt``, its ``completion``, the ``finish_reason`` (``eos``, ``stop``, ``length``), and the row's
    other ``columns``. The file takes its name when it is whole: a run that breaks off leaves an earlier one alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Begin the file."""
        rank = "" if trainer.world_size == 1 else f".{trainer.global_rank}"
        self._path = run_folder(trainer) / f"completions{rank}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._unfinished.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Write the batch's lines."""
        assert self._file is not None
        for line in outputs:
            # A data set may hold what JSON does not know, a date for instance.
            self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Give the file its name."""
        assert self._path is not None
        self._close()
        self._unfinished.replace(self._path)
        print(f"completions: {self._path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Close the file of a run that broke off; what it holds stays under its unfinished name."""
        self._close()

    @property
    def _unfinished(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f".{self._path.name}")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
