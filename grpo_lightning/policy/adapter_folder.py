"""Adapters on disk, in PEFT's form: a config, the weights of A and B, and which model they were trained on."""

import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo_lightning.policy.adaptation import NAME, adapted_layers
from grpo_lightning.types import ConfigurationError

_CONFIG, _WEIGHTS, _BASE = "adapter_config.json", "adapter_model.safetensors", "base_checksum.json"
_PREFIX = "base_model.model."
"""Before the names of the model's own modules."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file()


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, by their names in the model."""
    names = {f"{name}.lora_{part}.{NAME}.weight" for name in adapted_layers(model) for part in "AB"}
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor] | None, base_checksum: int | None) -> None:
    """Write what ``peft.PeftModel.from_pretrained`` loads onto the same model.

    Args:
        model: With an adapter.
        folder: Where to.
        weights: A and B by their names in the model, where it does not hold them whole itself.
        base_checksum: Of the model's other weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = adapter_weights(model)
    tensors = {_name_on_disk(name): (found if weights is None else weights)[name] for name in found}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS)
    config = copy(model.peft_config[NAME])
    config.inference_mode = True
    config.save_pretrained(folder)
    base = {"checksum": base_checksum, "dtype": str(model.dtype)}
    (folder / _BASE).write_text(json.dumps(base) + "\n")


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder."""

    folder: Path
    config: Any
    """PEFT's, of its class for LoRA."""

    @classmethod
    def read(cls, folder: Path, key: str) -> "Adapter":
        """The config of an adapter.

        Args:
            folder: Of PEFT's.
            key: The setting that names the folder.

        Raises:
            ConfigurationError: There is none, or it is none of LoRA's.
        """
        from peft import LoraConfig, PeftConfig

        if not is_adapter(folder):
            raise ConfigurationError(f"{key}: {str(folder)!r} is no folder with {_CONFIG} and {_WEIGHTS}.")
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{key}: the adapter in {str(folder)!r} cannot be read: {error}") from error
        if not isinstance(config, LoraConfig):
            raise ConfigurationError(f"{key}: the adapter in {str(folder)!r} is {config.peft_type}, not LoRA.")
        config.inference_mode, config.lora_dropout = False, 0.0
        return cls(folder, config)

    def check_base(self, dtype: torch.dtype, checksum: int, key: str) -> None:
        """The model is the one that the adapter was trained on, as far as the folder says.

        Raises:
            ConfigurationError: It is another one.
        """
        file = self.folder / _BASE
        base = json.loads(file.read_text()) if file.is_file() else {}
        if base.get("dtype") == str(dtype) and base.get("checksum") not in (None, checksum):
            raise ConfigurationError(
                f"{key}: the adapter in {str(self.folder)!r} was trained on another model, "
                f"{self.config.base_model_name_or_path or 'without a name'}: its weights are not these."
            )

    def fill_in(self, model: nn.Module, key: str) -> None:
        """Give the model's A and B the adapter's values.

        Raises:
            ConfigurationError: They are other ones, or of another shape.
        """
        saved = load_file(self.folder / _WEIGHTS)
        wanted = {_name_on_disk(name): parameter for name, parameter in adapter_weights(model).items()}
        for name in sorted({*saved, *wanted}):
            shapes = [tuple(of[name].shape) if name in of else "absent" for of in (saved, wanted)]
            if shapes[0] != shapes[1]:
                raise ConfigurationError(
                    f"{key}: the adapter in {str(self.folder)!r} is of another model: {name} is {shapes[0]} there "
                    f"and {shapes[1]} in the model."
                )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(saved[name])


def _name_on_disk(name: str) -> str:
    return _PREFIX + name.replace(f".{NAME}.weight", ".weight")
