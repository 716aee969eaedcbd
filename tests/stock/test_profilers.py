"""Profilers: each names the phases of an iteration."""

import pytest
import torch
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from stock.matrix import shows
from stock.runs import VALIDATED, fit

PHASES = ("generate", "score", "prepare", "update")


@shows("Profilers", "SimpleProfiler")
def test_the_report_has_the_seconds_of_each_phase(tmp_path, claim):
    profiler = SimpleProfiler(tmp_path, "report")
    _, module, _ = fit(iterations=3, num_epochs=2, profiler=profiler, val_check_interval=2, **VALIDATED)
    calls = {name: len(seconds) for name, seconds in profiler.recorded_durations.items()}
    assert [calls[f"[phase]{name}"] for name in PHASES] == [3, 3, 3, 6]
    for name in PHASES:
        # The profiler's clock is inside ours.
        assert sum(profiler.recorded_durations[f"[phase]{name}"]) <= module.seconds_by_phase[name]
    report = (tmp_path / "fit-report.txt").read_text()
    assert all(f"[phase]{name}" in report for name in (*PHASES, "evaluate"))
    claim.works(
        "three iterations of two updates: `[phase]generate`, `[phase]score` and `[phase]prepare` three times each, "
        "`[phase]update` six times, and `[phase]evaluate`"
    )


@shows("Profilers", "AdvancedProfiler")
def test_the_report_has_the_functions_of_each_phase(tmp_path, claim):
    fit(iterations=2, live=True, profiler=AdvancedProfiler(tmp_path, "report"))
    actions = (tmp_path / "fit-report.txt").read_text().split("Profile stats for: ")
    text = {action.split()[0]: action for action in actions[1:]}
    assert "decoding.py" in text["[phase]generate"]
    assert "head.py" in text["[phase]update"]
    claim.works("the functions of decoding under `[phase]generate`, those of the loss under `[phase]update`")


@shows("Profilers", "PyTorchProfiler")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_trace_has_the_phases_and_their_kernels(tmp_path, claim):
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    settings = {"export_to_chrome": False, "record_module_names": False, "row_limit": -1}
    fit(iterations=3, profiler=PyTorchProfiler(tmp_path, "report", schedule=schedule, **settings))
    report = (tmp_path / "fit-report.txt").read_text()
    assert all(f"[pl][profile][phase]{name}" in report for name in PHASES)
    assert "aten::mm" in report
    claim.works("`[phase]` entries of generate, score, prepare and update beside the operations of torch")
