"""LoRA: small trained additions to frozen weights."""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo_lightning.policy.adaptation import adapted_layers, weights_checksum
from grpo_lightning.policy.adapter_folder import Adapter, adapter_weights
from grpo_lightning.types import ConfigurationError

_DEFAULT_RANK = 16
_FROM = "model.lora.from_adapter"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Trains a low-rank addition to each linear layer, and freezes the model itself.

    .. math::
        W + \tfrac{\alpha}{r} B A, \qquad B \in R^{out \times r},\ A \in R^{r \times in}

    B begins at 0 and A at random, so that the policy that a run begins with is the model. There is no dropout. A and B
    have at least single precision. Source: Hu et al., section 4.1 (https://arxiv.org/abs/2106.09685).

    Args:
        rank: r, >= 1; None for 16.
        alpha: > 0; None for 2 r.
        targets: The last parts of the names of linear layers, as in [q_proj, v_proj]; None for all but the head.
        from_adapter: A folder of PEFT's, whose A and B the run goes on from; its rank, alpha and targets need not be
            given. The reference model is the model without any adapter all the same.

    Raises:
        ConfigurationError: A setting is out of its range or not what `from_adapter` has, there is no adapter, or PEFT
            is not installed.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: list[str] | None = None
    from_adapter: str | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigurationError(f"model.lora.rank must be >= 1, got {self.rank}.")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigurationError(f"model.lora.alpha must be > 0, got {self.alpha}.")
        if self.targets is not None and not self.targets:
            raise ConfigurationError("model.lora.targets must name a layer, or be null for all linear ones, got [].")
        require_peft("model.lora")
        if self._adapter is not None:
            self._check_agreement(self._adapter.config)

    def adapt(self, model: PreTrainedModel, *, seed: int) -> int:
        """Freeze a model and add A and B to it, in place: its class and the names of its other modules stay.

        Args:
            model: With its whole weights.
            seed: Of A; the global random state is left as it was.

        Returns:
            The checksum of the model's own weights.

        Raises:
            ConfigurationError: The targets are no linear layers of this model, or the adapter is of another one.
        """
        checksum, adapter = weights_checksum(model), self._adapter
        if adapter is None:
            inject(self._new_config(model), model, seed=seed)
        else:
            put_on(adapter, model, checksum, _FROM)
        return checksum

    def adapt_skeleton(self, model: PreTrainedModel) -> None:
        """As `adapt`, for a model on the meta device: shapes alone.

        Raises:
            ConfigurationError: The targets are no linear layers of this model.
        """
        config = self._new_config(model) if self._adapter is None else self._adapter.config
        with torch.device("meta"):
            inject(config, model, seed=0)

    @property
    def _adapter(self) -> Adapter | None:
        return None if self.from_adapter is None else Adapter.read(Path(self.from_adapter).expanduser(), _FROM)

    def _check_agreement(self, there: Any) -> None:
        """What is given beside an adapter must be what it has."""
        pairs = {
            "rank": (self.rank, there.r),
            "alpha": (self.alpha, there.lora_alpha),
            "targets": (self.targets and sorted(self.targets), _listed(there.target_modules)),
        }
        for name, (given, value) in pairs.items():
            if given is not None and given != value:
                raise ConfigurationError(
                    f"model.lora.{name} is {value} in the adapter {self.from_adapter!r}, got {given}. Leave it out."
                )

    def _new_config(self, model: PreTrainedModel) -> Any:
        from peft import LoraConfig

        layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        head = model.get_output_embeddings()
        found = sorted({_last(name) for name, module in layers.items() if module is not head})
        is_tied = head is not None and head.weight is model.get_input_embeddings().weight
        allowed = {_last(name) for name, module in layers.items() if module is not head or not is_tied}
        for target in self.targets or ():
            if target not in allowed:
                raise ConfigurationError(
                    f"model.lora.targets: {target!r} is no linear layer with weights of its own in the policy "
                    f"({model.config.model_type}), which has {', '.join(found)}."
                )
        rank = self.rank or _DEFAULT_RANK
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            target_modules=self.targets or found,
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
            base_model_name_or_path=_location(model),
        )


def require_peft(key: str) -> None:
    """PEFT can be imported.

    Raises:
        ConfigurationError: It cannot; `key` is the setting that needs it.
    """
    if find_spec("peft") is None:
        raise ConfigurationError(f"{key} needs PEFT, which is not installed: pip install 'grpo_lightning[lora]'")


def put_on(adapter: Adapter, model: PreTrainedModel, checksum: int, key: str) -> None:
    """Add the A and B of an adapter to a model, in place.

    Args:
        adapter: From a folder.
        model: Without an adapter.
        checksum: Of its weights.
        key: The setting that names the folder.

    Raises:
        ConfigurationError: The adapter is of another model, or has more than A and B.
    """
    adapter.check_base(model.dtype, checksum, key)
    try:
        inject(adapter.config, model, seed=0)
    except ValueError as error:
        raise ConfigurationError(
            f"{key}: the adapter in {str(adapter.folder)!r} is of another model: {error}"
        ) from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = adapted_layers(model).values()
    if trained != set(adapter_weights(model)) or any(layer.lora_variant for layer in layers):
        raise ConfigurationError(f"{key}: the adapter in {str(adapter.folder)!r} has more than low-rank additions.")
    adapter.fill_in(model, key)


def inject(config: Any, model: PreTrainedModel, *, seed: int) -> None:
    """Have PEFT put its layers into a model, with an A that the seed determines."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # GPT-2's layers are kept transposed, its head is not: PEFT finds out for each, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inject_adapter_in_model(config, model)
    for parameter in adapter_weights(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _location(model: PreTrainedModel) -> str | None:
    """Where a model was loaded from, to be found again from any folder."""
    name = model.name_or_path or None
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _listed(targets: Any) -> Any:
    return targets if isinstance(targets, str) else sorted(targets or ())
