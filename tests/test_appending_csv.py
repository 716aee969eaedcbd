import csv

from grpo_lightning.appending_csv import AppendingCSVLogger


def log(folder, step, **metrics):
    logger = AppendingCSVLogger(save_dir=folder, name="", version="")
    logger.log_metrics(metrics, step=step)
    logger.save()


def test_a_second_run_goes_on_with_the_file_also_under_new_names(tmp_path):
    log(tmp_path, 0, reward=0.5)
    log(tmp_path, 1, reward=0.75)
    log(tmp_path, 2, accuracy=1.0)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["reward"] for row in rows] == ["0.5", "0.75", ""]
    assert [row["accuracy"] for row in rows] == ["", "", "1.0"]
