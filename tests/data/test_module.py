import doctest
import importlib
import inspect
import logging
import pkgutil

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

import grpo_lightning.data
from grpo_lightning.data import PromptDataModule
from grpo_lightning.data.encoding import PlacedRow
from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.types import ConfigurationError, Demonstration, Prompt


class Lists(PromptDataModule):
    """Data given as lists of prompts."""

    def __init__(self, train=(), validation=(), test=(), shown=(), **settings):
        super().__init__(**settings)
        self.given = {"train": train, "validation": validation, "test": test}
        self.shown = shown

    def rows(self, split):
        return [{"prompt": text, "answer": text} for text in self.given[split]]

    def demonstration_rows(self):
        return [{"prompt": text, "demonstration": demonstration} for text, demonstration in self.shown]


def refuse(tokenizer, **given):
    with pytest.raises(ConfigurationError) as error:
        Lists(**given).encode(tokenizer)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_every_split_is_encoded(tokenizer):
    data = Lists("ab", "cd", "e")
    data.encode(tokenizer)
    assert texts(data.training_prompts) == ["a", "b"]
    assert texts(data.validation_prompts) == ["c", "d"]
    assert texts(data.test_prompts) == ["e"]


LONG = {"train": ["1+1=", "1+1+1=", "1+1+1+1=", "2="], "max_prompt_tokens": 5}


class TestLongPrompts:
    def test_are_named_and_counted(self, tokenizer):
        assert refuse(tokenizer, **LONG) == (
            "data.max_prompt_tokens: 2 of 4 prompts of the train split are longer than 5 tokens; the longest is row 2 "
            "with 8.\nRaise the limit, or set data.on_long_prompt: drop."
        )

    def test_are_named_by_file_and_line_where_known(self, tokenizer, monkeypatch):
        row = PlacedRow({"prompt": "1+1+1+1="}, place="train.jsonl:17")
        monkeypatch.setattr(Lists, "rows", lambda self, split: [row] if split == "train" else [])
        assert "the longest is train.jsonl:17 with 8" in refuse(tokenizer, **LONG)

    def test_are_dropped_counted_and_said(self, tokenizer, caplog):
        data = Lists(**LONG, on_long_prompt="drop")
        with caplog.at_level(logging.INFO):
            data.encode(tokenizer)
        assert [(p.index, p.text) for p in data.training_prompts] == [(0, "1+1="), (3, "2=")]
        assert data.dropped == {"train": 2, "validation": 0, "test": 0}
        assert "2 of 4 prompts of the train split" in caplog.text

    def test_are_not_all_dropped(self, tokenizer):
        assert "2 of 2 prompts" in refuse(tokenizer, train=["abc", "def"], max_prompt_tokens=2, on_long_prompt="drop")

    def test_a_prompt_as_long_as_the_limit_is_not_long(self, tokenizer):
        data = Lists(train=["1+1+="], max_prompt_tokens=5)
        data.encode(tokenizer)
        assert len(data.training_prompts) == 1


class TestOverlap:
    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_of_held_out_prompts_is_named_and_counted(self, tokenizer, split):
        assert refuse(tokenizer, train="abc", **{split: "xcay"}) == (
            f"data: 2 of 4 prompts of the {split} split are trained on too; the first is row 1: 'c'.\n"
            "Remove them, or set data.allow_overlap: true."
        )

    def test_is_allowed_where_asked_for(self, tokenizer):
        data = Lists("abc", "xca", allow_overlap=True)
        data.encode(tokenizer)
        assert texts(data.validation_prompts) == ["x", "c", "a"]

    def test_of_a_dropped_prompt_is_none(self, tokenizer):
        data = Lists(["a", "bb"], ["bb", "c"], max_prompt_tokens=1, on_long_prompt="drop")
        data.encode(tokenizer)
        assert texts(data.validation_prompts) == ["c"]

    def test_of_demonstrations_is_a_mistake(self, tokenizer):
        data = Lists("a", "b", shown=[("a", "A"), ("b", "B")])
        data.encode(tokenizer)
        with pytest.raises(ConfigurationError, match="1 of 1 prompts of the validation split are shown in"):
            data.demonstrations(tokenizer)


class TestDemonstrations:
    def test_are_prompt_and_completion_with_the_end(self, tokenizer):
        (shown,) = Lists(shown=[("2+2=", "4")]).demonstrations(tokenizer)
        end = tokenizer.eos_token_id
        assert shown == Demonstration(tuple(tokenizer("2+2=")["input_ids"]), (*tokenizer("4")["input_ids"], end))

    def test_of_long_prompts_are_dropped_with_them(self, tokenizer):
        data = Lists(shown=[("2+2+2=", "6"), ("2=", "2")], max_prompt_tokens=2, on_long_prompt="drop")
        (shown,) = data.demonstrations(tokenizer)
        assert tokenizer.decode(shown.prompt_ids) == "2="
        assert tokenizer.decode(shown.completion_ids[:-1]) == "2"

    @pytest.mark.parametrize("text", ["", None, 4])
    def test_are_texts(self, tokenizer, text):
        with pytest.raises(ConfigurationError, match="the demonstration of row 1 must be a text"):
            Lists(shown=[("a", "A"), ("b", text)]).demonstrations(tokenizer)

    def test_have_no_characters_that_cannot_be_written(self, tokenizer):
        with pytest.raises(ConfigurationError, match="the demonstration of row 1 has characters"):
            Lists(shown=[("a", "A"), ("b", "€")]).demonstrations(tokenizer)

    def test_are_missing_where_the_data_have_none(self, tokenizer):
        class Bare(PromptDataModule):
            def rows(self, split):
                return []

        with pytest.raises(ConfigurationError, match="data: Bare has no demonstrations"):
            Bare().demonstrations(tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation_batch_size": 0}, "data.evaluation_batch_size must be >= 1, got 0."),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens must be >= 1, got 0."),
        ({"on_long_prompt": "cut"}, "data.on_long_prompt must be 'error' or 'drop', got 'cut'."),
        ({"seed": -1}, r"data.seed must be in \[0, 2\*\*32\), got -1."),
        ({"prompt_template": "Q:"}, "data.prompt_template"),
    ],
)
def test_a_setting_out_of_its_range_is_named(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Lists(**settings)


class OneBatch:
    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        return iter([self.batch])

    def __len__(self):
        return 1


class Watcher(LightningModule):
    """Stands in for the module: it has a tokenizer, makes the training batches and notes what it is given."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.seen = []

    def training_loader(self, datamodule):
        return OneBatch(datamodule.training_prompts)

    def training_step(self, batch, index):
        self.seen.append(("train", texts(batch)))
        return torch.zeros((), requires_grad=True)

    def validation_step(self, batch, index):
        self.seen.append(("validation", [prompt.prompt.text for prompt in batch]))

    def test_step(self, batch, index):
        self.seen.append(("test", [prompt.prompt.text for prompt in batch]))

    def predict_step(self, batch, index):
        self.seen.append(("predict", [prompt.prompt.text for prompt in batch]))
        return self.seen[-1]

    def configure_optimizers(self):
        return None


def run(stage, data, tokenizer):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, num_sanity_val_steps=0, **quiet)
    watcher = Watcher(tokenizer)
    getattr(trainer, stage)(watcher, datamodule=data)
    return watcher.seen


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
class TestUnderATrainer:
    def test_fit_gets_the_modules_batches_and_the_held_out_prompts(self, tokenizer):
        seen = run("fit", Lists("ab", "cde", evaluation_batch_size=2), tokenizer)
        assert seen == [("train", ["a", "b"]), ("validation", ["c", "d"]), ("validation", ["e"])]

    @pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # Lightning says it, rightly
    def test_fit_without_held_out_prompts_does_not_validate(self, tokenizer):
        assert run("fit", Lists("ab"), tokenizer) == [("train", ["a", "b"])]

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_an_evaluation_without_held_out_prompts_is_refused(self, tokenizer, stage):
        with pytest.raises(ConfigurationError, match="data: there are no held-out prompts to evaluate on"):
            run(stage, Lists("ab", test="d" if stage == "validate" else ""), tokenizer)

    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_a_stage_takes_the_test_prompts_or_else_the_validation_prompts(self, tokenizer, stage):
        assert run(stage, Lists("ab", "c", "d"), tokenizer) == [(stage, ["d"])]
        assert run(stage, Lists("ab", "c"), tokenizer) == [(stage, ["c"])]
        assert run(stage, Lists("ab", "", "d"), tokenizer) == [(stage, ["d"])]

    def test_another_tokenizer_encodes_anew(self, tokenizer):
        data, other = Lists("ab", "c"), CharacterPolicy("cba").load_tokenizer()
        for reader in (tokenizer, other):
            run("validate", data, reader)
            assert [reader.decode(prompt.token_ids) for prompt in data.training_prompts] == ["a", "b"]
        assert tokenizer("a")["input_ids"] != other("a")["input_ids"]


FINAL = [
    cls
    for cls in vars(grpo_lightning.data).values()
    if isinstance(cls, type) and issubclass(cls, PromptDataModule) and not inspect.isabstract(cls)
]


def test_the_data_sets_are_found():
    assert {cls.__name__ for cls in FINAL} == {"Arithmetic", "HuggingFaceDataset", "JSONLines", "ReasoningGym"}


@pytest.mark.parametrize("cls", FINAL, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_type_and_a_help(cls, capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.help=grpo_lightning.data.{cls.__name__}"])
    (explained,) = capsys.readouterr().out.split("Help for ")[1:]
    settings = " ".join(explained.split()).split(" --data.")[1:]
    names = {setting.split()[0] for setting in settings}
    assert {"seed", "evaluation_batch_size"} <= names
    for setting in settings:
        described = setting.split(" ", 2)[-1]
        assert "type: " in described, setting
        assert not described.startswith("("), f"no help: {setting}"


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(grpo_lightning.data.__path__)])
def test_the_examples_in_the_docstrings_are_true(module):
    module = importlib.import_module(f"grpo_lightning.data.{module}")
    assert doctest.testmod(module, extraglobs={"Prompt": Prompt}).failed == 0
