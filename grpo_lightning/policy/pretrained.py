"""A policy from a local folder or a hub."""

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.policy.adaptation import merge, weights_checksum
from grpo_lightning.policy.adapter_folder import Adapter, is_adapter
from grpo_lightning.policy.lora import put_on, require_peft
from grpo_lightning.policy.source import PolicySource
from grpo_lightning.types import ConfigurationError

_PATH = "model.policy.path"


class PretrainedPolicy(PolicySource):
    """A causal language model that transformers loads.

    Args:
        path: A local folder (anything that starts with ``.``, ``/`` or ``~``, or exists), or a hub id
            (``Qwen/Qwen2.5-0.5B-Instruct``). The folder may be an adapter's, as a run under model.lora leaves it: the
            policy is then the model that it was trained on, with the adapter merged into its weights.
        dtype: Precision of the weights in training; "auto" takes what the checkpoint is stored in.
        attn_implementation: The attention of transformers; None lets it choose.
        revision: Branch, tag or commit of the hub's repository.
        trust_remote_code: Whether code from the model's repository may run on this machine.
        made_by: A config whose `fit` makes the folder `path`; where the folder is missing, the command line runs it
            first and says so.
    """

    def __init__(
        self,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = "float32",
        attn_implementation: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        made_by: str | None = None,
    ) -> None:
        self.path = path
        self.made_by = made_by
        self._hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._model = {"dtype": dtype, "attn_implementation": attn_implementation}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder or repository."""
        self._require_folder()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._location, **self._hub)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigurationError(
                f"model.policy.path: no tokenizer could be loaded from {self.path!r}: {_reason(error)}"
            ) from error
        if tokenizer.eos_token_id is None:
            raise ConfigurationError(f"model.policy.path: the tokenizer of {self.path!r} has no end-of-sequence token.")
        return tokenizer

    def load_model(self, *, seed: int) -> PreTrainedModel:  # noqa: ARG002 - a checkpoint leaves nothing to chance
        """The model with its weights."""
        self._require_folder()
        if self._is_local and is_adapter(Path(self._location)):
            return self._load_merged(Adapter.read(Path(self._location), _PATH))
        try:
            return AutoModelForCausalLM.from_pretrained(self._location, **self._hub, **self._model)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ConfigurationError(
                f"model.policy.path: no causal language model could be loaded from {self.path!r}: {_reason(error)}"
            ) from error

    def load_skeleton(self) -> PreTrainedModel:
        """The model that the config describes; no weights need to be there."""
        self._require_folder()
        if self._is_local and is_adapter(Path(self._location)):
            return self._base_of(Adapter.read(Path(self._location), _PATH)).load_skeleton()
        try:
            config = AutoConfig.from_pretrained(self._location, **self._hub)
            model = {**self._model, "dtype": config.dtype} if self._model["dtype"] == "auto" else self._model
            with torch.device("meta"):
                found: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=self._hub["trust_remote_code"], **model
                )
                return found
        except (OSError, ValueError, KeyError) as error:
            raise ConfigurationError(
                f"model.policy.path: no causal language model is described by {self.path!r}: {_reason(error)}"
            ) from error

    def _load_merged(self, adapter: Adapter) -> PreTrainedModel:
        require_peft(_PATH)
        model = self._base_of(adapter).load_model(seed=0)
        put_on(adapter, model, weights_checksum(model), _PATH)
        merge(model)
        model.name_or_path = self._location
        return model

    def _base_of(self, adapter: Adapter) -> "PretrainedPolicy":
        """Where the model comes from that an adapter was trained on."""
        base = adapter.config.base_model_name_or_path
        if base is None:
            raise ConfigurationError(f"{_PATH}: the adapter in {self.path!r} does not say which model it is for.")
        source = PretrainedPolicy(base)
        source._hub, source._model = self._hub, self._model
        return source

    @property
    def _location(self) -> str:
        return str(Path(self.path).expanduser()) if self._is_local else self.path

    @property
    def _is_local(self) -> bool:
        return self.path.startswith((".", "/", "~")) or Path(self.path).exists() or self.path.count("/") != 1

    def _require_folder(self) -> None:
        folder = Path(self.path).expanduser()
        if self._is_local and not (folder / "config.json").is_file() and not is_adapter(folder):
            missing = "has no config.json" if folder.is_dir() else "does not exist"
            raise ConfigurationError(f"model.policy.path: the model folder {self.path!r} {missing}.")


def _reason(error: Exception) -> str:
    """The first line of what `error` says, or all of it where that line only announces the others."""
    message = str(error).strip() or type(error).__name__
    first = message.splitlines()[0].rstrip()
    return " ".join(message.split()) if first.endswith(":") else first
