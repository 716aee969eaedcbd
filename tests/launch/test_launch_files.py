"""The launch files start two ranks as their schedulers would, with the numbers of a run that is started as usual."""

import csv
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launched import WAITS_IN
from processes import World

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs" / "launch"
CONFIG = Path(__file__).parent / "launched.yaml"
LIMIT_SECONDS = 240
STOP_SECONDS = 60
JOB = 4711


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def result(folder):
    """The weights at the end, and the metrics of each step but those that clocks make."""
    run = folder / "runs" / "launched" / "a"
    with (run / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in csv.DictReader(file)
        ]
    return torch.load(run / "checkpoints" / "last.ckpt")["state_dict"], rows


def assert_same(folder, straight):
    (weights, rows), (expected, expected_rows) = result(folder), straight
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert rows == expected_rows
    assert [row["step"] for row in rows] == [str(step) for step in range(6)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two ranks that Lightning starts."""
    folder = tmp_path_factory.mktemp("straight")
    command = [sys.executable, "-m", "grpo_lightning", "fit", "--config", CONFIG, "--trainer.devices", "2"]
    run = World(folder, command)
    assert run.end_within(LIMIT_SECONDS) == 0, run.printed[-3000:]
    return result(folder)


def start(folder, commands, **environment):
    return [World(folder, command, PYTHON=sys.executable, **{**environment, **own}) for command, own in commands]


def stop_all(worlds):
    for world in worlds:
        world.kill()


@pytest.mark.slow
def test_torchrun_on_two_nodes(tmp_path, straight):
    head = f"127.0.0.1:{free_port()}"
    node = (["bash", LAUNCH / "torchrun.sh", "--config", CONFIG], {})
    nodes = start(tmp_path, [node, node], NODES="2", DEVICES="1", HEAD=head)
    try:
        assert nodes[0].end_within(LIMIT_SECONDS) == nodes[1].first.wait() == 0, nodes[0].printed[-3000:]
        assert_same(tmp_path, straight)
    finally:
        stop_all(nodes)


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" &
  echo $! > task.$rank
done
status=0
for rank in 0 1; do wait $(cat task.$rank) || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol
"""


@pytest.mark.slow
def test_slurm_requeues_a_job_which_goes_on_by_itself(tmp_path, straight):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "MASTER_ADDR": "127.0.0.1",
        "SLURM_JOB_ID": str(JOB),
        "SLURM_JOB_NAME": "grpo",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    batch = ["bash", LAUNCH / "slurm.sbatch", "--config", CONFIG]
    (job,) = start(tmp_path, [(batch, {WAITS_IN: str(tmp_path)})], MASTER_PORT=str(free_port()), **slurm)
    try:
        job.wait_for("at_moment.0", "at_moment.1")
        for rank in range(2):
            os.kill(int((tmp_path / f"at_moment.{rank}").read_text()), signal.SIGUSR1)
        assert job.end_within(STOP_SECONDS) == 128 + signal.SIGUSR1, job.printed[-3000:]
        assert (tmp_path / "scontrol").read_text() == f"requeue {JOB}\n"
        assert (tmp_path / "runs" / "slurm" / str(JOB) / "hpc_ckpt_1.ckpt").is_file()
        (again,) = start(tmp_path, [(batch, {})], MASTER_PORT=str(free_port()), **slurm)
        assert again.end_within(LIMIT_SECONDS) == 0, again.printed[-3000:]
        assert_same(tmp_path, straight)
        assert not list(tmp_path.glob("runs/launched/a.*")), "a requeued job goes on in its own folder"
    finally:
        job.kill()


def manifest():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return service, job, container


def test_the_pods_of_the_manifest_find_the_first_one():
    service, job, container = manifest()
    pod = job["spec"]["template"]["spec"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["MASTER_ADDR"]["value"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert job["spec"]["completionMode"] == "Indexed"
    assert f"--trainer.num_nodes={job['spec']['completions']}" in container["command"]
    assert f"--trainer.devices={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_that_was_stopped_is_no_failure():
    _, job, container = manifest()
    rules = job["spec"]["podFailurePolicy"]["rules"]
    (stopped,) = [rule for rule in rules if 128 + signal.SIGTERM in rule.get("onExitCodes", {}).get("values", [])]
    assert stopped["action"] == "Ignore"
    assert stopped["onExitCodes"]["containerName"] == container["name"]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # what such rules ask for


@pytest.mark.slow
def test_kubernetes_makes_evicted_pods_anew_which_go_on(tmp_path, straight):
    _, job, container = manifest()
    own = ("--config=", "--trainer.accelerator=", "--trainer.devices=")
    command = [sys.executable, *(part for part in container["command"][1:] if not part.startswith(own))]
    command += ["--config", CONFIG, "--trainer.devices=1"]

    def pods(**environment):
        # The names in the manifest's `env`, with what a cluster would make of their values on this one machine.
        values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        named = [entry["name"] for entry in container["env"]]
        assert sorted(named) == sorted([*values, "NODE_RANK"])
        ranks = range(job["spec"]["completions"])
        return start(tmp_path, [(command, {"NODE_RANK": str(rank)}) for rank in ranks], **values, **environment)

    evicted = pods(**{WAITS_IN: str(tmp_path)})
    try:
        evicted[0].wait_for("at_moment.0", "at_moment.1")
        evicted[1].first.send_signal(signal.SIGTERM)
        assert evicted[0].end_within(STOP_SECONDS) == evicted[1].first.wait() == 143, evicted[0].printed[-3000:]
        anew = pods()
        assert anew[0].end_within(LIMIT_SECONDS) == anew[1].first.wait() == 0, anew[0].printed[-3000:]
        assert_same(tmp_path, straight)
    finally:
        stop_all(evicted)


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_scripts_are_valid_bash(name):
    assert os.spawnlp(os.P_WAIT, "bash", "bash", "-n", str(LAUNCH / name)) == 0


def test_the_page_names_every_launch_file():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(f"configs/launch/{file.name}" in page for file in LAUNCH.iterdir())


def test_slurm_sends_the_signal_that_lightning_requeues_at():
    """To the ranks, which it does without a ``B:``."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=USR1@" in text
    assert "#SBATCH --requeue" in text
