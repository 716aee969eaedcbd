"""One process on one device, as a strategy that has a name."""

from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from grpo_lightning.types import ConfigurationError


class SingleStrategy(SingleDeviceStrategy):
    """Lightning's strategy of one process, on the device that `trainer.accelerator` and `trainer.devices` name.

    Lightning's own takes the device as a setting, and has no name in `trainer.strategy`.
    """

    strategy_name = "single"

    def __init__(self) -> None:
        super().__init__(device="cpu")

    @property
    def parallel_devices(self) -> Sequence[torch.device]:
        """None yet: the Trainer gives them when it finds none."""
        return ()

    @parallel_devices.setter
    def parallel_devices(self, devices: Sequence[torch.device]) -> None:
        if len(devices) != 1:
            raise ConfigurationError(
                f"trainer.strategy: single is one process, and trainer.devices gives {len(devices)}. "
                "Set trainer.devices to 1, or another strategy."
            )
        self._root_device = devices[0]
