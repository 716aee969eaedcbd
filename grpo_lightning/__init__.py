"""GRPO training of language models on PyTorch Lightning."""

from grpo_lightning.module import GRPOModule
from grpo_lightning.supervised import SupervisedModule
from grpo_lightning.version import __version__

__all__ = ["GRPOModule", "SupervisedModule", "__version__"]
