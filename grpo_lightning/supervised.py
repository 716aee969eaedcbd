"""The cold start: imitation of worked demonstrations, before GRPO."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from grpo_lightning.admission import is_readable
from grpo_lightning.batching import Layout, Packed, Row, usable_layout
from grpo_lightning.checkpointing import VerifiedCheckpoints, check_destination, write_whole
from grpo_lightning.data import PromptDataModule
from grpo_lightning.ending import EndTogether, Stopping
from grpo_lightning.functional.random import permutation
from grpo_lightning.models import check_policy, placed
from grpo_lightning.optim import Schedule
from grpo_lightning.policy import LoRA, Policy, PolicyRecipe, PolicySource, is_adapted
from grpo_lightning.preconditions import check_flags, check_limit
from grpo_lightning.resumed import ResumedFromWhole
from grpo_lightning.resuming import is_of_grpo
from grpo_lightning.rollout.lengths import max_positions
from grpo_lightning.stock_callbacks import save_nothing_of_a_trial
from grpo_lightning.strategies import placement_of
from grpo_lightning.strategies.communication import check_communication
from grpo_lightning.types import ConfigurationError, Demonstration, Stream, TokenScores


class SupervisedModule(ResumedFromWhole):
    r"""Maximises the likelihood of demonstrations: the cold start of DeepSeek-R1 (https://arxiv.org/abs/2501.12948).

    The loss is the mean negative log-likelihood of the demonstrations' tokens, over the whole batch of all ranks. At
    the end the policy is written to `export_to`, a folder that a GRPO run loads and takes as its reference.

    Args:
        policy: Where the policy comes from.
        optimizer: Built from the policy's parameters.
        batch_size: Demonstrations per optimizer step, over all ranks.
        export_to: The policy's folder: absent, empty, or of an earlier policy, which it replaces.
        schedule: Of the learning rate; None for constant.
        lora: What of it is trained; None for all weights. The folder is then an adapter's.
        gradient_checkpointing: Whether the backward pass computes each layer again.
        seed: Of random weights and of the order.
    """

    def __init__(
        self,
        policy: PolicySource,
        optimizer: OptimizerCallable,
        batch_size: int,
        export_to: str,
        schedule: Schedule | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigurationError(f"model.batch_size must be >= 1, got {batch_size}.")
        self.source, self.lora, self.gradient_checkpointing = policy, lora, gradient_checkpointing
        self.make_optimizer = optimizer
        self.batch_size = batch_size
        self.export_to = export_to
        self.schedule = schedule or Schedule()
        self.seed = seed
        self.layout: Layout = Packed()
        self.policy: Policy | None = None
        self.stopping = Stopping()

    def configure_callbacks(self) -> list[Callback]:
        """The one that every run has."""
        save_nothing_of_a_trial(self.trainer)
        return [EndTogether(self.stopping)]

    def training_step(self, batch: Sequence[Demonstration], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The loss of this rank's share of the batch, over the tokens of the whole batch."""
        mine = batch[self.global_rank :: self.trainer.world_size]
        num_tokens = sum(len(d.completion_ids) for d in batch)
        loss: Tensor = -self._logprob(mine) * self.trainer.world_size / num_tokens
        self.log("train/loss", loss.detach(), batch_size=len(mine), prog_bar=True, sync_dist=True)
        return loss

    def _logprob(self, demonstrations: Sequence[Demonstration]) -> Tensor:
        """The summed log-probability of some demonstrations' tokens."""
        assert self.policy is not None
        rows = [
            Row(i, torch.tensor(d.prompt_ids), torch.tensor(d.completion_ids)) for i, d in enumerate(demonstrations)
        ]
        scores: TokenScores = self.policy(self.layout.lay_out(rows, self.device), temperature=1.0)
        return scores.logprobs_BT.sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """A run may stop where the optimizer has stepped."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.stopping.check()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self.source.load_tokenizer()

    @property
    def _destination(self) -> Path:
        return Path(self.export_to).expanduser()

    def setup(self, stage: str) -> None:
        """Check what only the Trainer knows, before the model is loaded, and have checkpoints verified."""
        if stage == "fit":
            check_flags(self.trainer)
            check_destination(self._destination, "model.export_to")
        strategy = self.trainer.strategy
        if not isinstance(strategy.checkpoint_io, VerifiedCheckpoints):
            strategy.checkpoint_io = VerifiedCheckpoints(strategy.checkpoint_io, self.choose_checkpoint)

    def check_settings(self, trainer: Trainer) -> None:
        """See `CheckedBeforehand`."""
        check_flags(trainer)
        check_communication(trainer.strategy)
        check_destination(self._destination, "model.export_to")

    def check_inputs(self, trainer: Trainer, datamodule: LightningDataModule | None) -> None:
        """See `CheckedBeforehand`."""
        recipe = self._recipe
        demonstrations: Sequence[Demonstration] = ()
        if is_readable(datamodule):
            datamodule.encode(self.tokenizer)
            loader = self._loader(datamodule, trainer.world_size)
            check_limit(trainer, len(loader))
            demonstrations = loader.demonstrations
        skeleton = check_policy(recipe, trainer.strategy)
        if skeleton is not None:
            check_positions(demonstrations, skeleton.config)

    @property
    def _recipe(self) -> PolicyRecipe:
        settings: Any = {"lora": self.lora, "gradient_checkpointing": self.gradient_checkpointing}
        return PolicyRecipe(source=self.source, tokenizer=self.tokenizer, seed=self.seed, **settings)

    def configure_model(self) -> None:
        """Load the policy."""
        if self.policy is None:
            self.policy = policy = placed(self._recipe, self.trainer)
            self.layout = usable_layout(self.layout, lambda: policy.follows_segments)

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule by steps."""
        assert self.policy is not None
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        scheduler = self.schedule.scheduler(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_loader(self, datamodule: PromptDataModule) -> "DemonstrationLoader":
        """Batches of demonstrations, in an order that the seed and the epoch determine."""
        assert self.policy is not None
        loader = self._loader(datamodule, self.trainer.world_size)
        check_positions(loader.demonstrations, self.policy.model.config)
        return loader

    def _loader(self, datamodule: PromptDataModule, world_size: int) -> "DemonstrationLoader":
        demonstrations = datamodule.demonstrations(self.tokenizer)
        if self.batch_size < world_size:
            raise ConfigurationError(
                f"model.batch_size must be at least the number of ranks = {world_size}, got {self.batch_size}."
            )
        if len(demonstrations) < self.batch_size:
            raise ConfigurationError(
                f"model.batch_size must be at most the {len(demonstrations)} demonstrations, got {self.batch_size}."
            )
        return DemonstrationLoader(demonstrations, self.batch_size, self.seed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a cold start has written it.

        Raises:
            ConfigurationError: It is of a GRPO run.
        """
        if is_of_grpo(checkpoint):
            raise ConfigurationError(
                "ckpt_path: the checkpoint is one of a GRPO run, and the cold start comes before it.\n"
                "To imitate from its policy, set model.policy.path to the .policy folder beside the checkpoint."
            )

    def on_fit_end(self) -> None:
        """Write the policy's folder, but not that of a trial."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.policy is not None
        model = self.policy.model
        weights = placement_of(self.trainer.strategy).weights(model, trained_only=is_adapted(model))
        if self.trainer.is_global_zero:
            write_whole(self._destination, partial(self.policy.save, weights=weights), key="model.export_to")
            print(f"The policy after the cold start: {self.export_to}")


def check_positions(demonstrations: Sequence[Demonstration], config: PreTrainedConfig) -> None:
    """The longest demonstration has at most as many tokens as the policy has positions.

    Raises:
        ConfigurationError: It has more.
    """
    limit = max_positions(config)
    longest = max((len(shown.prompt_ids) + len(shown.completion_ids) for shown in demonstrations), default=0)
    if limit is not None and longest > limit:
        raise ConfigurationError(
            f"model.policy: a demonstration of {longest} tokens, with its prompt, exceeds the policy's {limit} "
            "positions. Give a CharacterPolicy more max_positions, or set data.max_prompt_tokens with "
            "data.on_long_prompt: drop."
        )


class DemonstrationLoader:
    """Whole batches of demonstrations, in a new order each epoch; stateful, so that Lightning resumes it exactly.

    Args:
        demonstrations: All of them.
        batch_size: Of a batch, over all ranks.
        seed: Of the order.
    """

    def __init__(self, demonstrations: Sequence[Demonstration], batch_size: int, seed: int) -> None:
        self.demonstrations, self.batch_size, self.seed = demonstrations, batch_size, seed
        self._epoch = 0
        self._next = 0

    def __len__(self) -> int:
        return len(self.demonstrations) // self.batch_size

    def __iter__(self) -> Iterator[list[Demonstration]]:
        order = self._order()
        for _ in range(len(self)):
            if self._next == len(self):  # also within an epoch of the Trainer's, which may limit its batches
                self._epoch, self._next = self._epoch + 1, 0
                order = self._order()
            first = self._next * self.batch_size
            self._next += 1
            yield [self.demonstrations[i] for i in order[first : first + self.batch_size]]

    def _order(self) -> list[int]:
        numbers = permutation(len(self.demonstrations), seed=self.seed, stream=Stream.PROMPT_ORDER, epoch=self._epoch)
        return [int(i) for i in numbers.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches yielded."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after them."""
        self._epoch, self._next = state["epoch"], state["next"]
