"""The measurement for a GPU, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_lightning.batching import Packed
from tools.benchmark import gpu
from tools.benchmark.gpu import HALF_BILLION, TINY, RandomQwen2


def test_the_model_has_half_a_billion_weights():
    source = RandomQwen2(HALF_BILLION.model, max_positions=2048)
    with torch.device("meta"):
        model = source.load_model(seed=0)
    # Qwen2.5-0.5B has 494,032,768: https://huggingface.co/Qwen/Qwen2.5-0.5B
    assert sum(p.numel() for p in model.parameters()) == 494_032_768


def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone():
    source = RandomQwen2(TINY.model, max_positions=32)
    state = torch.get_rng_state()
    one, same, other = (source.load_model(seed=seed).get_input_embeddings().weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_layouts_agree():
    differences = gpu.layout_differences(torch.device("cpu"))
    assert set(differences) == {"packed", "shared_prefix"}
    assert all(0 <= value < gpu.TOLERANCE for of_layout in differences.values() for value in of_layout.values())


class Backwards(Packed):
    """Has the prompts' tokens in the wrong order."""

    def lay_out(self, rows, device):
        return super().lay_out([row._replace(prompt_ids=row.prompt_ids.flip(0)) for row in rows], device)


def test_a_layout_that_differs_is_found(monkeypatch):
    monkeypatch.setitem(gpu._LAYOUTS, "packed", Backwards())
    differences = gpu.layout_differences(torch.device("cpu"))
    assert all(value > gpu.TOLERANCE for value in differences["packed"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "There is no CUDA device here.\n"


def test_a_trial_on_the_cpu_writes_every_figure(tmp_path):
    command = [sys.executable, "-m", "tools.benchmark.gpu", "--device", "cpu", "--reduced", "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    subprocess.run([*command, "--output", str(tmp_path)], cwd=root, env=environment, check=True, capture_output=True)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert len(written["iterations"]) == 2
    medians = written["medians"]
    names = {f"time/{phase}" for phase in ("generate", "score", "prepare", "update")}
    names |= {f"throughput/{name}" for name in ("generated_tokens_per_second", "update_mfu", "peak_memory_gib")}
    assert all(medians[name] > 0 for name in names)
