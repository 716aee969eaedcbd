"""Which checkpoint a run goes on from."""

from abc import ABC
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from lightning.pytorch import LightningModule

from grpo_lightning.checkpointing import make_room, whole_checkpoint


class ResumedFromWhole(LightningModule, ABC):
    """Goes on from a checkpoint that is whole."""

    found_checkpoints: Sequence[Path] = ()
    """Those that the run has found itself, the first choice first."""
    _skipped: Sequence[Path] = ()
    """Torn ones, without which the run goes on."""

    def choose_checkpoint(self, path: Path) -> Path:
        """See `whole_checkpoint`. A collective."""
        chosen = whole_checkpoint(path, self.found_checkpoints)
        if chosen != path:
            self.trainer._checkpoint_connector._ckpt_path = str(chosen)  # what Lightning says that it has restored
            self._skipped = [*takewhile(lambda found: found != chosen, self.found_checkpoints)]
        return chosen

    def on_train_start(self) -> None:
        """The checkpoint has been found to fit: torn ones that the run goes on without make room for others."""
        if self.trainer.is_global_zero:
            make_room(self._skipped)
