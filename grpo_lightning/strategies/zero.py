"""DeepSpeed's ZeRO: optimizer states, gradients and weights in shards, on GPUs and on CPUs."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from grpo_lightning.checkpointing import read_mapped
from grpo_lightning.checkpointing.shards import read_whole
from grpo_lightning.strategies.communication import TIMEOUT_SECONDS, check_backend, give_up_after, timeout_of
from grpo_lightning.strategies.placement import Placement
from grpo_lightning.strategies.zero_placement import ZeRO3Placement, ZeROPlacement
from grpo_lightning.strategies.zero_state import (
    optimizer_state,
    set_optimizer_state,
    set_whole_weight,
    whole_weight,
)
from grpo_lightning.types import ConfigurationError


class ZeROStrategy(DeepSpeedStrategy):
    """A stage of ZeRO (https://arxiv.org/abs/1910.02054), to the rest of the run a strategy like any other.

    Lightning's own class refuses CPUs, divides the loss of an accumulated update twice, lets optimizer hooks run at
    every micro-batch, and writes checkpoints that no other strategy reads. Here checkpoints are single files with the
    whole state in full precision, and a run resumes under any strategy.

    Args:
        stage: 1 shards the optimizer states, 2 the gradients too, 3 the weights too.
        offload: Keep in the CPU's memory what is sharded, and step there: optimizer states and gradients, and with
            stage 3 the weights. For models that do not fit otherwise; a step then takes much longer.
        zero_settings: Further entries of the section `zero_optimization` of DeepSpeed's configuration
            (https://www.deepspeed.ai/docs/config-json/), such as `reduce_bucket_size`.
        checkpoint: As under `FSDP2Strategy`, but "sharded" is refused: see docs/scaling.md.
        process_group_backend: Of torch.distributed; None takes what suits the device.
        timeout_seconds: How long ranks wait for each other in a collective before they give up a rank that hangs, and
            the run. It must be longer than the slowest rollout, its scoring and a checkpoint take.

    Raises:
        ConfigurationError: DeepSpeed is not installed, checkpoints are to be sharded, the backend is not there, or the
            timeout is none.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: bool = False,
        zero_settings: dict[str, Any] | None = None,
        checkpoint: Literal["whole", "sharded"] = "whole",
        process_group_backend: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        if find_spec("deepspeed") is None:
            raise ConfigurationError(
                "trainer.strategy: ZeRO needs DeepSpeed: pip install 'grpo_lightning[deepspeed]', or set fsdp2."
            )
        if checkpoint != "whole":
            raise ConfigurationError(
                f"trainer.strategy.checkpoint: {checkpoint} is not for deepspeed_{stage}, whose shards no other "
                "strategy, stage or number of ranks reads; set whole, or take fsdp2."
            )
        check_backend(process_group_backend)
        name_accelerator()
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            process_group_backend=process_group_backend,
            timeout=timeout_of(timeout_seconds),
        )
        self.stage = stage
        self.timeout_seconds = timeout_seconds
        self.config: dict[str, Any]
        self.config["zero_optimization"].update(zero_settings or {})
        self.config["zero_force_ds_cpu_optimizer"] = False  # its own is compiled on first use
        self._numbered: list[list[nn.Parameter]] = []

    @property
    def placement_kind(self) -> type[Placement]:
        """See `placement_kind`.

        Raises:
            ConfigurationError: As `setup_environment`.
        """
        self._check_precision()
        return ZeRO3Placement if self.stage == 3 else ZeROPlacement

    @property
    def placement(self) -> Placement:
        """How this strategy shards."""
        return ZeRO3Placement(self) if self.stage == 3 else ZeROPlacement(self)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the weights in forward and backward, whatever that of the policy is."""
        return torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else torch.float32

    # The process

    def setup_environment(self) -> None:
        """As DDP does: Lightning's refuses CPUs.

        Raises:
            ConfigurationError: Weights would be stepped in half precision, in which small steps are lost.
        """
        self._check_precision()
        if self._is_on_cpu:
            _compile_nothing()
        DDPStrategy.setup_environment(self)
        precision: Any = self.precision_plugin.precision
        self.precision_plugin = _UndividedPrecision(precision)

    def _check_precision(self) -> None:
        precision: Any = self.precision_plugin.precision
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigurationError(
                f"trainer.precision under deepspeed_{self.stage} must be 32-true, or bf16-mixed to compute in bfloat16 "
                f"and step in fp32, got {precision}."
            )

    def setup_distributed(self) -> None:
        """Without the check of CUDA's device numbers where there are none."""
        if not self._is_on_cpu:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Then the ranks that DeepSpeed has put into a group of its own wait as long as all do."""
        super().setup(trainer)
        give_up_after(timeout_of(self.timeout_seconds), self.deepspeed_engine.seq_data_parallel_group)

    @property
    def root_device(self) -> torch.device:
        """With a number on CPUs too, which DeepSpeed asks for."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    @property
    def _is_on_cpu(self) -> bool:
        return super().root_device.type == "cpu"

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build the model whole; it is cut with its optimizer. Models of transformers cannot be built in parts."""
        yield

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """Remember which weights the optimizer has under which number: ZeRO puts flat shards in their place."""
        self._numbered = [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    # The update

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning counts the micro-batches, as everywhere, and steps at an update's end alone.

        Otherwise it would call the optimizer's hooks at every micro-batch, and leave it to DeepSpeed whether it steps
        (https://github.com/Lightning-AI/pytorch-lightning/issues/19350).
        """
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing: whether the ranks exchange gradients within an update is up to the stage."""
        yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tell DeepSpeed, before the forward, whether the backward ends an update."""
        assert self.lightning_module is not None
        ends_update = not self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(ends_update)
        return super().training_step(*args, **kwargs)

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that the module saves, whole and in full precision, on the first rank. A collective."""
        assert self.lightning_module is not None
        weights = {}
        for name, weight in self.lightning_module.state_dict(keep_vars=True).items():
            whole = whole_weight(weight)
            if self.is_global_zero:
                weights[name] = whole
        return weights

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state that the optimizer would have without ZeRO, on the first rank. A collective."""
        return optimizer_state(optimizer, self._numbered)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """One file, by the first rank."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """On every rank; tensors of a file are mapped, not read."""
        path = Path(checkpoint_path)
        return read_mapped(self.checkpoint_io, path, read_folder=read_whole, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: ARG002
        """Put the weights where ZeRO has them. A collective."""
        assert self.lightning_module is not None
        saved = checkpoint["state_dict"]
        for name, weight in self.lightning_module.state_dict(keep_vars=True).items():
            if name in saved:
                set_whole_weight(weight, saved[name])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is in the file."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the states into the shards."""
        (saved,) = checkpoint["optimizer_states"]
        set_optimizer_state(self.optimizers[0], self._numbered, saved)


class _UndividedPrecision(DeepSpeedPrecision):
    """Undoes, in this one place, what DeepSpeed divides the loss by: Lightning has divided it by the accumulation.

    See https://github.com/Lightning-AI/pytorch-lightning/issues/6170.
    """

    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As Lightning's, without the second division."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def convert_input(self, data: Any) -> Any:
        """As it is: ticks and prompts, in which no number is the model's input."""
        return data


def _compile_nothing() -> None:
    """Take gloo for every collective: DeepSpeed would compile one of its own for CPUs."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def name_accelerator() -> None:
    """Tell DeepSpeed where there is no accelerator: when it is imported it would say on stdout that it found none.

    Transformers imports it when a model is loaded, where it is installed, whatever the strategy.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
