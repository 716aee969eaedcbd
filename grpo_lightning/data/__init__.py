"""Data: prompts, their order, and the splits."""

from grpo_lightning.data.arithmetic import Arithmetic
from grpo_lightning.data.columns import ColumnDataModule
from grpo_lightning.data.evaluation_loader import EvaluationLoader
from grpo_lightning.data.hugging_face import HuggingFaceDataset
from grpo_lightning.data.json_lines import JSONLines
from grpo_lightning.data.module import PromptDataModule
from grpo_lightning.data.reasoning_gym import ReasoningGym
from grpo_lightning.data.stream import PromptStream

__all__ = [
    "Arithmetic",
    "ColumnDataModule",
    "EvaluationLoader",
    "HuggingFaceDataset",
    "JSONLines",
    "PromptDataModule",
    "PromptStream",
    "ReasoningGym",
]
