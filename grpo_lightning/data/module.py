"""What every data set shares: tokens, limits, splits that do not overlap, and shares per rank."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from grpo_lightning.data.encoding import PromptEncoder, Row, Split, place_of
from grpo_lightning.data.evaluation_loader import EvaluationLoader
from grpo_lightning.types import ConfigurationError, Demonstration, Prompt

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class PromptDataModule(LightningDataModule, ABC):
    r"""Feeds prompts. Subclass it, implement `rows`, and name the class under `data`.

    Args:
        seed: Of generated content and of random splits.
        prompt_column: The column that holds the prompt: a text, or a list of messages.
        system_prompt: Begins every conversation; makes a text prompt a conversation.
        prompt_template: A text with ``{prompt}`` in it, put around the prompt (around the last message of a
            conversation); null for the prompt alone. Other braces, as in ``\boxed{}``, stay as they are.
        use_chat_template: Makes every text prompt a conversation of one user message.
        max_prompt_tokens: Longest prompt in tokens, >= 1; null for no limit.
        on_long_prompt: Whether a longer prompt is an error, or is dropped and counted.
        allow_overlap: Whether held-out prompts may be trained on.
        evaluation_batch_size: Held-out prompts completed at once, over all ranks, >= 1.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    def __init__(
        self,
        seed: int = 0,
        prompt_column: str = "prompt",
        system_prompt: str | None = None,
        prompt_template: str | None = None,
        use_chat_template: bool = False,
        max_prompt_tokens: int | None = None,
        on_long_prompt: Literal["error", "drop"] = "error",
        allow_overlap: bool = False,
        evaluation_batch_size: int = 256,
    ) -> None:
        super().__init__()
        require(0 <= seed < 2**32, "seed", "in [0, 2**32)", seed)
        require(evaluation_batch_size >= 1, "evaluation_batch_size", ">= 1", evaluation_batch_size)
        require(max_prompt_tokens is None or max_prompt_tokens >= 1, "max_prompt_tokens", ">= 1", max_prompt_tokens)
        require(on_long_prompt in ("error", "drop"), "on_long_prompt", "'error' or 'drop'", repr(on_long_prompt))
        self.seed = seed
        self.prompt_column = prompt_column
        self.encoder = PromptEncoder(
            prompt_column=prompt_column,
            system_prompt=system_prompt,
            prompt_template=prompt_template,
            use_chat_template=use_chat_template,
        )
        self.max_prompt_tokens = max_prompt_tokens
        self.on_long_prompt = on_long_prompt
        self.allow_overlap = allow_overlap
        self.evaluation_batch_size = evaluation_batch_size
        self.dropped: dict[Split, int] = {}
        self._prompts: dict[Split, list[Prompt]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split; none where the data have no such split."""

    def demonstration_rows(self) -> Sequence[Row]:
        """Rows with a ``demonstration`` column: what to write after the prompt. For the cold start."""
        raise ConfigurationError(f"data: {type(self).__name__} has no demonstrations to learn from.")

    def setup(self, stage: str) -> None:
        """Tokenise every split, and check that held-out prompts are not trained on, and are there to be evaluated on.

        Raises:
            ConfigurationError: As `encode`; or there is nothing to `validate`, `test` or `predict` on.
        """
        tokenizer = self._lightning_module().tokenizer
        if self._tokenizer is not tokenizer:
            self.encode(tokenizer)
        if stage != "fit" and not self.validation_prompts and (stage == "validate" or not self.test_prompts):
            raise ConfigurationError(
                "data: there are no held-out prompts to evaluate on: the validation split is empty."
            )

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenise every split with the policy's tokenizer. `setup` does it; without a Trainer, call it yourself.

        Raises:
            ConfigurationError: A row cannot be read, a prompt is too long, or a held-out prompt is trained on.
        """
        self._prompts = {}
        for split in SPLITS:
            rows = self.rows(split)
            prompts = self.encoder.encode(rows, tokenizer)
            self._prompts[split] = self._within_limit(prompts, rows, split)
            self.dropped[split] = len(prompts) - len(self._prompts[split])
        self._check_overlap(self._prompts["train"], "are trained on too")
        self._tokenizer = tokenizer

    @property
    def training_prompts(self) -> list[Prompt]:
        """The prompts to train on."""
        return self._encoded("train")

    @property
    def validation_prompts(self) -> list[Prompt]:
        """The held-out prompts of `validate`; a prompt's place is its slot."""
        return self._encoded("validation")

    @property
    def test_prompts(self) -> list[Prompt]:
        """The held-out prompts of `test`; a prompt's place is its slot."""
        return self._encoded("test")

    def demonstrations(self, tokenizer: PreTrainedTokenizerBase) -> list[Demonstration]:
        """The cold start's examples, in tokens, each ended by the end-of-sequence token.

        Raises:
            ConfigurationError: There are none, one cannot be written in tokens, or one shows a held-out prompt.
        """
        rows = self.demonstration_rows()
        prompts = self._within_limit(self.encoder.encode(rows, tokenizer), rows, "train")
        if self._tokenizer is tokenizer:
            self._check_overlap(prompts, "are shown in demonstrations too")
        texts = [_demonstration(rows[prompt.index], prompt.index) for prompt in prompts]
        completions = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for prompt, ids in zip(prompts, completions, strict=True):
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                where = place_of(rows[prompt.index], prompt.index)
                raise ConfigurationError(
                    f"data: the demonstration of {where} has characters that the tokenizer does not know."
                )
        end = tokenizer.eos_token_id
        return [Demonstration(prompt.token_ids, (*ids, end)) for prompt, ids in zip(prompts, completions, strict=True)]

    def train_dataloader(self) -> Any:
        """What the module trains on: ticks for GRPO, which pulls its prompts itself; batches for the cold start."""
        return self._lightning_module().training_loader(self)

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """The validation prompts of this rank; without any, an empty list, with which `fit` does not validate."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> EvaluationLoader | list[Any]:
        """The test prompts of this rank, or the validation prompts where there are none."""
        return self._evaluation_loader("test" if self.test_prompts else "validation")

    def predict_dataloader(self) -> EvaluationLoader | list[Any]:
        """As `test_dataloader`."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Ticks, prompts and demonstrations stay where they are: tokens are moved when they are laid out."""
        return batch

    def _encoded(self, split: Split) -> list[Prompt]:
        assert self._prompts, "call `encode` first; under a Trainer, `setup` does"
        return self._prompts[split]

    def _evaluation_loader(self, split: Split) -> EvaluationLoader | list[Any]:
        prompts = self._encoded(split)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return EvaluationLoader(prompts, self.evaluation_batch_size, rank, world_size) if prompts else []

    def _lightning_module(self) -> Any:
        assert self.trainer is not None, "Lightning attaches the trainer before it calls this"
        return self.trainer.lightning_module

    def _within_limit(self, prompts: list[Prompt], rows: Sequence[Row], split: Split) -> list[Prompt]:
        limit = self.max_prompt_tokens
        if limit is None:
            return prompts
        kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
        if len(kept) == len(prompts):
            return prompts
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        message = (
            f"data.max_prompt_tokens: {len(prompts) - len(kept)} of {len(prompts)} prompts of the {split} split are "
            f"longer than {limit} tokens; the longest is {place_of(rows[longest.index], longest.index)} with "
            f"{len(longest.token_ids)}."
        )
        if self.on_long_prompt == "error" or not kept:
            raise ConfigurationError(f"{message}\nRaise the limit, or set data.on_long_prompt: drop.")
        rank_zero_info(f"{message} They are dropped.")
        return kept

    def _check_overlap(self, prompts: Sequence[Prompt], what: str) -> None:
        """Refuse held-out prompts that are among `prompts`, as the policy reads them."""
        if self.allow_overlap:
            return
        learned = {prompt.token_ids for prompt in prompts}
        for split in SPLITS[1:]:
            shared = [prompt for prompt in self._prompts[split] if prompt.token_ids in learned]
            if shared:
                where = place_of(self.rows(split)[shared[0].index], shared[0].index)
                raise ConfigurationError(
                    f"data: {len(shared)} of {len(self._prompts[split])} prompts of the {split} split {what}; the "
                    f"first is {where}: {shared[0].text[:80]!r}.\nRemove them, or set data.allow_overlap: true."
                )


def require(is_fulfilled: bool, name: str, expected: str, got: object) -> None:
    """Refuse a setting of the data.

    Raises:
        ConfigurationError: It is not fulfilled.
    """
    if not is_fulfilled:
        raise ConfigurationError(f"data.{name} must be {expected}, got {got}.")


def _demonstration(row: Row, index: int) -> str:
    text = row.get("demonstration")
    if not isinstance(text, str) or not text:
        raise ConfigurationError(
            f"data: the demonstration of {place_of(row, index)} must be a text that is not empty, got {text!r}."
        )
    return text
