"""Loggers: each holds the run's metrics, under the number of the step that they are of."""

import json
import struct
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from stock.matrix import shows
from stock.runs import VALIDATED, fit, rows

METRIC = "reward/mean"


def fit_with(logger):
    """Four updates of two micro-batches, validated after each other one: the metric of each update by its step."""
    settings = {"iterations": 4, "accumulate": 2, "val_check_interval": 4}
    record, _, _ = fit(logger=logger, **settings, **VALIDATED)
    return {step: metrics[METRIC] for step, metrics in enumerate(record.metrics)}, {1, 3}


SEEN = "four updates of two micro-batches: `reward/mean` of each at steps 0 to 3, and two validations at steps 1 and 3"


@shows("Loggers", "CSVLogger")
def test_a_csv_file_has_a_line_per_update(tmp_path, claim):
    expected, validated = fit_with(CSVLogger(tmp_path, name="", version=""))
    lines = rows(tmp_path)
    assert {row["step"]: row[METRIC] for row in lines if METRIC in row} == pytest.approx(expected)
    assert {row["step"] for row in lines if "validation/num_prompts" in row} == validated
    claim.works(SEEN)


@shows("Loggers", "TensorBoardLogger")
def test_the_event_file_has_every_metric_at_its_step(tmp_path, claim):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected, validated = fit_with(TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {event.step: event.value for event in events.Scalars(METRIC)} == pytest.approx(expected)
    assert {event.step for event in events.Scalars("validation/num_prompts")} == validated
    claim.works(SEEN)


def records(file):
    """The records of W&B's file: LevelDB's format of logs, in blocks of 32 KiB, after seven bytes of its own."""
    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield part
            part = b""


@shows("Loggers", "WandbLogger, offline")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandbs_file_has_every_metric_at_its_step(tmp_path, monkeypatch, claim):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    expected, validated = fit_with(WandbLogger(project="toy", save_dir=tmp_path, offline=True))
    wandb.teardown()  # waits until the file is whole
    (file,) = Path(tmp_path).glob("wandb/offline-run-*/run-*.wandb")
    history = [Record.FromString(record).history.item for record in records(file)]
    lines = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in history if items]
    step = "trainer/global_step"
    assert {line[step]: line[METRIC] for line in lines if METRIC in line} == pytest.approx(expected)
    assert {line[step] for line in lines if "validation/num_prompts" in line} == validated
    claim.works(SEEN + ", in the file that `wandb sync` would send")


@shows("Loggers", "MLFlowLogger, local")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:MLFlow only allows")
def test_mlflows_folder_has_every_metric_at_its_step(tmp_path, monkeypatch, claim):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "runs").as_uri()
    logger = MLFlowLogger("toy", tracking_uri=uri)
    expected, validated = fit_with(logger)
    client = MlflowClient(uri)
    history = {m: client.get_metric_history(logger.run_id, m) for m in (METRIC, "validation/num_prompts")}
    assert {entry.step: entry.value for entry in history[METRIC]} == pytest.approx(expected)
    assert {entry.step for entry in history["validation/num_prompts"]} == validated
    claim.works(
        SEEN + ", with `mlflow-skinny`. MLflow 3 writes folders only where MLFLOW_ALLOW_FILE_STORE=true is in the "
        "environment; its databases need the whole `mlflow` and were not tried. Of `pass@1` it keeps `pass1`, and says "
        "it"
    )
