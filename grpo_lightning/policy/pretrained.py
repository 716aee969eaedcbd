"""A policy from a local folder or a hub."""

from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.policy.source import PolicySource
from grpo_lightning.types import ConfigurationError


class PretrainedPolicy(PolicySource):
    """A causal language model that transformers loads.

    Args:
        path: A local folder (anything that starts with ``.``, ``/`` or ``~``, or exists), or a hub id
            (``Qwen/Qwen2.5-0.5B-Instruct``).
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
        try:
            return AutoModelForCausalLM.from_pretrained(self._location, **self._hub, **self._model)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ConfigurationError(
                f"model.policy.path: no causal language model could be loaded from {self.path!r}: {_reason(error)}"
            ) from error

    @property
    def _location(self) -> str:
        return str(Path(self.path).expanduser()) if self._is_local else self.path

    @property
    def _is_local(self) -> bool:
        return self.path.startswith((".", "/", "~")) or Path(self.path).exists() or self.path.count("/") != 1

    def _require_folder(self) -> None:
        folder = Path(self.path).expanduser()
        if self._is_local and not (folder / "config.json").is_file():
            missing = "has no config.json" if folder.is_dir() else "does not exist"
            raise ConfigurationError(f"model.policy.path: the model folder {self.path!r} {missing}.")


def _reason(error: Exception) -> str:
    """The first line of what `error` says, or all of it where that line only announces the others."""
    message = str(error).strip() or type(error).__name__
    first = message.splitlines()[0].rstrip()
    return " ".join(message.split()) if first.endswith(":") else first
