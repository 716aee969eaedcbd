"""Prompts from a data set of the Hugging Face hub, or from a folder that `datasets` saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_lightning.data.columns import ColumnDataModule
from grpo_lightning.data.encoding import PlacedRow, Split
from grpo_lightning.types import ConfigurationError


class HuggingFaceDataset(ColumnDataModule):
    """A data set that `datasets` loads. Needs the extra ``datasets``.

    Args:
        path: A hub id (``openai/gsm8k``), or a folder: one that `save_to_disk` wrote, or one with data files.
        configuration: The data set's configuration (``main``); null for its default.
        train_split: Name of the training split.
        validation_split: Name of the validation split; null splits `validation_size` rows off the training split.
        test_split: Name of the test split; null for none.
        revision: Branch, tag or commit.
        **kwargs: The settings of `ColumnDataModule` and of `PromptDataModule`.

    Raises:
        ConfigurationError: `datasets` is not installed, or a setting is out of its range.
    """

    def __init__(
        self,
        path: str,
        configuration: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _datasets()
        self.path, self.configuration, self.revision = path, configuration, revision
        self.splits: dict[Split, str | None] = {
            "train": train_split,
            "validation": validation_split,
            "test": test_split,
        }

    def load(self, split: Split) -> Sequence[PlacedRow] | None:
        """The rows of a split, by its name in the data set.

        Raises:
            ConfigurationError: The data set, or the split in it, cannot be loaded.
        """
        name = self.splits[split]
        if name is None:
            return None
        try:
            rows = self._table(name).to_list()
        except (OSError, ValueError, _datasets().exceptions.DatasetsError) as error:
            # Of a broken file, `datasets` says no more than that something went wrong; the cause says what.
            told = error if isinstance(error, OSError | ValueError) else error.__cause__ or error
            reason = (str(told).strip().splitlines() or [type(told).__name__])[0][:200]
            raise ConfigurationError(
                f"data.path: the split {name!r} (data.{split}_split) of {self.path!r} cannot be loaded: {reason}"
            ) from error
        if not rows:
            raise ConfigurationError(f"data.{split}_split: the split {name!r} of {self.path!r} is empty.")
        return [PlacedRow(row, place=f"{self.path} {name} row {i}") for i, row in enumerate(rows)]

    def _table(self, name: str) -> Any:
        datasets, folder = _datasets(), Path(self.path).expanduser()
        has_splits, is_one_split = (folder / "dataset_dict.json").is_file(), (folder / "state.json").is_file()
        if not has_splits and not is_one_split:
            local = str(folder) if folder.is_dir() else self.path
            return datasets.load_dataset(local, self.configuration, split=name, revision=self.revision)
        for setting in ("configuration", "revision"):
            if getattr(self, setting) is not None:
                raise ValueError(f"data.{setting} must be null, since the folder is a saved data set")
        if is_one_split and name != self.splits["train"]:
            raise ValueError("the folder holds one split only, which is taken for data.train_split")
        saved = datasets.load_from_disk(str(folder))
        if has_splits and name not in saved:
            raise ValueError(f"the folder holds the splits {', '.join(saved)}")
        return saved[name] if has_splits else saved


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError("HuggingFaceDataset needs datasets: pip install 'grpo_lightning[datasets]'") from error
    return datasets
