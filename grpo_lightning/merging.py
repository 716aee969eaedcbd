"""The command `merge`: an adapter and the model that it was trained on, as one model."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from grpo_lightning.checkpointing import write_whole
from grpo_lightning.policy import Policy, PretrainedPolicy, is_adapter
from grpo_lightning.types import ConfigurationError


def main(args: list[str]) -> None:
    """Run the command with the given arguments, without its name."""
    parser = ArgumentParser(prog="grpo-lightning merge", exit_on_error=False)
    parser.add_function_arguments(merge_adapter, as_positional=True)
    merge_adapter(**parser.parse_args(args).as_dict())


def merge_adapter(
    adapter: str, to: str, dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = "auto"
) -> None:
    """Write the model that an adapter makes of its base, as a folder that transformers alone loads.

    Args:
        adapter: The folder of a run's policy under model.lora, or any other of PEFT's whose config names its base.
        to: A folder that is not there yet.
        dtype: Of the weights; "auto" for that of the base on disk.

    Raises:
        ConfigurationError: There is no adapter, its base cannot be loaded or is another one, or `to` is there.
    """
    if not is_adapter(Path(adapter).expanduser()):
        raise ConfigurationError(f"merge: {adapter!r} is no folder with an adapter.")
    if Path(to).exists():
        raise ConfigurationError(f"merge: {to!r} is there already.")
    source = PretrainedPolicy(adapter, dtype=dtype)
    policy = Policy(source.load_model(seed=0), source.load_tokenizer())
    write_whole(Path(to), policy.save)
    print(f"The merged policy: {to}")
