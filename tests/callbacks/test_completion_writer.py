import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from grpo_lightning import GRPOModule
from grpo_lightning.callbacks.completion_writer import CompletionWriter
from grpo_lightning.callbacks.exact_answer import ExactAnswer
from grpo_lightning.data import PromptDataModule
from grpo_lightning.objective import grpo
from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.types import SamplingParams


class Sums(PromptDataModule):
    def rows(self, split):
        return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(5 if split == "test" else 0)]


class Broken(CompletionWriter):
    def on_predict_batch_end(self, *args, **kwargs):
        super().on_predict_batch_end(*args, **kwargs)
        raise RuntimeError("the disk is full")


def predict(folder, writer):
    module = GRPOModule(
        CharacterPolicy("0123456789+=", hidden_size=16, num_layers=1, num_heads=2, max_positions=32),
        grpo(),
        SamplingParams(max_new_tokens=4),
        partial(torch.optim.SGD, lr=0.0),
        prompts_per_iteration=1,
        group_size=2,
    )
    callbacks = [ExactAnswer(marker=""), writer]
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **settings)
    return trainer.predict(module, Sums(evaluation_batch_size=2))


def test_every_completion_is_returned_and_written(tmp_path, capsys):
    returned = [line for batch in predict(tmp_path, CompletionWriter()) for line in batch]
    written = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert written == returned
    assert [(line["slot"], line["prompt"], line["columns"]) for line in written] == [
        (i, f"{i}+1=", {"answer": str(i + 1)}) for i in range(5)
    ]
    assert all(line["completion"] and line["finish_reason"] in ("eos", "length") for line in written)
    assert str(tmp_path / "completions.jsonl") in capsys.readouterr().out


def test_a_run_that_breaks_off_leaves_an_earlier_file_alone(tmp_path):
    predict(tmp_path, CompletionWriter())
    before = (tmp_path / "completions.jsonl").read_text()
    with pytest.raises(RuntimeError, match="the disk is full"):
        predict(tmp_path, Broken())
    assert (tmp_path / "completions.jsonl").read_text() == before
    assert len((tmp_path / ".completions.jsonl").read_text().splitlines()) == 2
