"""What every data set shares: tokens, limits, splits that do not overlap, and shares per rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from grpo_lightning.types import ConfigurationError, Demonstration, EvaluationPrompt, Message, Prompt

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]


class PromptDataModule(LightningDataModule, ABC):
    """Feeds prompts. Subclass it, implement `rows`, and name the class under `data`.

    Args:
        seed: Of generated content and of random splits.
        prompt_column: The column that holds the prompt: a text, or a list of messages.
        system_prompt: Makes every text prompt a conversation that begins with this system message.
        use_chat_template: Makes every text prompt a conversation of one user message.
        max_prompt_tokens: Longest prompt in tokens; None for no limit.
        on_long_prompt: Whether a longer prompt is an error, or is dropped and counted.
        evaluation_batch_size: Held-out prompts completed at once, over all ranks.
    """

    def __init__(
        self,
        seed: int = 0,
        prompt_column: str = "prompt",
        system_prompt: str | None = None,
        use_chat_template: bool = False,
        max_prompt_tokens: int | None = None,
        on_long_prompt: Literal["error", "drop"] = "error",
        evaluation_batch_size: int = 256,
    ) -> None:
        super().__init__()
        if evaluation_batch_size < 1:
            raise ConfigurationError(f"data.evaluation_batch_size must be >= 1, got {evaluation_batch_size}.")
        self.seed = seed
        self.prompt_column = prompt_column
        self.system_prompt = system_prompt
        self.use_chat_template = use_chat_template or system_prompt is not None
        self.max_prompt_tokens = max_prompt_tokens
        self.on_long_prompt = on_long_prompt
        self.evaluation_batch_size = evaluation_batch_size
        self._prompts: dict[Split, list[Prompt]] = {}
        self.dropped: dict[Split, int] = {}

    @abstractmethod
    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split; none where the data have no such split."""

    def demonstration_rows(self) -> Sequence[Row]:
        """Rows with a ``demonstration`` column: what to write after the prompt. For the cold start."""
        raise ConfigurationError(f"data: {type(self).__name__} has no demonstrations to learn from.")

    def setup(self, stage: str) -> None:  # noqa: ARG002 - every stage needs the same
        """Tokenise every split, and check that held-out prompts are not trained on."""
        if not self._prompts:
            self.encode(self._lightning_module().tokenizer)

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenise every split with the policy's tokenizer."""
        splits: tuple[Split, ...] = ("train", "validation", "test")
        self._prompts = {split: self._encode_split(tokenizer, split) for split in splits}
        self._check_overlap()

    @property
    def training_prompts(self) -> list[Prompt]:
        """The prompts to train on."""
        return self._prompts["train"]

    def demonstrations(self, tokenizer: PreTrainedTokenizerBase) -> list[Demonstration]:
        """The cold start's examples, in tokens."""
        rows = self.demonstration_rows()
        prompts = self._token_ids(tokenizer, rows)
        texts = [str(row["demonstration"]) for row in rows]
        completions = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        end = tokenizer.eos_token_id
        return [Demonstration(p, (*c, end)) for p, c in zip(prompts, completions, strict=True)]

    def train_dataloader(self) -> Any:
        """What the module trains on: ticks for GRPO, which pulls its prompts itself; batches for the cold start."""
        return self._lightning_module().training_loader(self)

    def val_dataloader(self) -> "EvaluationLoader":
        """The validation prompts of this rank."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> "EvaluationLoader":
        """The test prompts of this rank, or the validation prompts where there are none."""
        return self._evaluation_loader("test" if self._prompts["test"] else "validation")

    def predict_dataloader(self) -> "EvaluationLoader":
        """As `test_dataloader`."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Ticks, prompts and demonstrations stay where they are: tokens are moved when they are laid out."""
        return batch

    def _evaluation_loader(self, split: Split) -> "EvaluationLoader":
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return EvaluationLoader(self._prompts[split], self.evaluation_batch_size, rank, world_size)

    def _lightning_module(self) -> Any:
        assert self.trainer is not None, "Lightning attaches the trainer before it calls this"
        return self.trainer.lightning_module

    def _encode_split(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Prompt]:
        rows = self.rows(split)
        prompts = []
        for index, (row, token_ids) in enumerate(zip(rows, self._token_ids(tokenizer, rows), strict=True)):
            messages = self._messages(row)
            text = messages[-1]["content"] if messages else str(row[self.prompt_column])
            columns = {name: value for name, value in row.items() if name != self.prompt_column}
            prompts.append(Prompt(index=index, token_ids=token_ids, text=text, messages=messages, columns=columns))
        return self._within_limit(prompts, split)

    def _token_ids(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[tuple[int, ...]]:
        if not rows:
            return []
        conversations = [self._messages(row) for row in rows]
        if conversations[0] is None:
            return [tuple(ids) for ids in tokenizer([str(row[self.prompt_column]) for row in rows])["input_ids"]]
        if tokenizer.chat_template is None:
            raise ConfigurationError(
                "data: the prompts are conversations, but the tokenizer has no chat template. Use an instruct model, "
                "or plain prompts (data.use_chat_template: false, no data.system_prompt)."
            )
        texts = tokenizer.apply_chat_template(
            [list(map(dict, c)) for c in conversations if c], add_generation_prompt=True, tokenize=False
        )
        return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _messages(self, row: Row) -> tuple[Message, ...] | None:
        content = row[self.prompt_column]
        system: tuple[Message, ...] = ()
        if self.system_prompt is not None:
            system = ({"role": "system", "content": self.system_prompt},)
        if isinstance(content, list):
            return (*system, *content)
        return (*system, {"role": "user", "content": str(content)}) if self.use_chat_template else None

    def _within_limit(self, prompts: list[Prompt], split: Split) -> list[Prompt]:
        if self.max_prompt_tokens is None:
            return prompts
        limit = self.max_prompt_tokens
        kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
        self.dropped[split] = len(prompts) - len(kept)
        if self.dropped[split] and self.on_long_prompt == "error":
            longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
            raise ConfigurationError(
                f"data.max_prompt_tokens: {self.dropped[split]} of {len(prompts)} prompts of the {split} split are "
                f"longer than {limit} tokens; the longest is row {longest.index} with {len(longest.token_ids)}.\n"
                "Raise the limit, or set data.on_long_prompt: drop."
            )
        return kept

    def _check_overlap(self) -> None:
        trained = {prompt.token_ids for prompt in self._prompts["train"]}
        for split in ("validation", "test"):
            shared = [prompt for prompt in self._prompts[split] if prompt.token_ids in trained]
            if shared:
                raise ConfigurationError(
                    f"data: {len(shared)} prompts of the {split} split are trained on too; the first is row "
                    f"{shared[0].index}: {shared[0].text[:80]!r}."
                )


class EvaluationLoader:
    """Batches of held-out prompts: rank r of W takes slots r, r + W, ...; every rank has equally many batches.

    Args:
        prompts: All held-out prompts; a prompt's place is its slot.
        batch_size: Prompts of a batch over all ranks.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, rank: int, world_size: int) -> None:
        self.prompts = [EvaluationPrompt(slot, prompt) for slot, prompt in enumerate(prompts)]
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[list[EvaluationPrompt]]:
        for first in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[first : first + self.batch_size]
            yield [prompt for prompt in batch if prompt.slot % self.world_size == self.rank]
