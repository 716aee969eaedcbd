"""Servers that a run starts: here commands that stand in for vLLM."""

import sys
import time
from pathlib import Path

import pytest
import torch

from grpo_lightning.rollout.local_servers import LaunchedServer, LaunchedServers, LocalServers
from grpo_lightning.types import ConfigurationError


class Standin(LocalServers):
    """Does what `arguments` say, with Python."""

    def command(self, folder, port, dtype):
        return [sys.executable, "-c", *self.arguments]


def wait_for_end(server):
    deadline = time.monotonic() + 20
    while server._process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_starts_a_server():
    servers = LocalServers(kv_cache_gib=0.5, arguments=["--max-num-seqs", "8"])
    command = servers.command(Path("folder"), 8123, torch.bfloat16)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = dict(zip(command[3::2], command[4::2], strict=True))
    assert flags == {
        "--model": "folder",
        "--dtype": "bfloat16",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--load-format": "dummy",
        "--logprobs-mode": "processed_logprobs",
        "--worker-extension-cls": "grpo_lightning.rollout.weight_receiver.WeightReceiver",
        "--kv-cache-memory-bytes": str(2**29),
        "--max-num-seqs": "8",
    }


def test_a_server_gets_its_own_devices_and_is_no_rank_of_the_training(monkeypatch):
    ranks = {"RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"}
    for name in ranks:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    environment = LocalServers(devices=["2,3"]).environment("2,3")
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert not ranks & set(environment)
    assert LocalServers().environment("")["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_server_that_ends_while_it_starts_is_said_with_its_last_words(tmp_path):
    server = LaunchedServer(Standin(arguments=["import sys; sys.exit('no memory')"]), "", tmp_path, torch.float32)
    wait_for_end(server)
    with pytest.raises(ConfigurationError, match=r"model\.engine\.local: .* status 1 while .*\nno memory"):
        server.keep_running()


def test_a_server_that_has_answered_is_started_again(tmp_path):
    server = LaunchedServer(Standin(arguments=["print('started')"]), "", tmp_path, torch.float32)
    server.has_answered = True
    wait_for_end(server)
    assert server.keep_running()
    wait_for_end(server)
    assert server._log.read_text() == "started\n" * 2


def test_each_entry_of_devices_is_a_server_and_all_are_ended(make_model, tokenizer):
    how = Standin(devices=["0", "1"], arguments=["import time; time.sleep(60)"])
    launched = LaunchedServers(how, make_model(), tokenizer, torch.float32)
    folder = Path(launched._folder.name)
    assert (folder / "config.json").is_file()
    assert not list(folder.glob("*.safetensors"))
    assert len({member.url for member in launched.members}) == 2
    assert not launched.keep_running()
    launched.stop()
    assert all(member._process.poll() is not None for member in launched.members)
    assert not folder.exists()


@pytest.mark.parametrize(("settings", "message"), [
    ({"devices": []}, "devices must name the GPUs of a server"),
    ({"python": "/nowhere/python"}, "python: there is no file '/nowhere/python'"),
    ({"kv_cache_gib": float("inf")}, "kv_cache_gib must be > 0 and finite, or null, got inf"),
    ({"start_seconds": 0}, "start_seconds must be > 0 and finite, got 0"),
])  # fmt: skip
def test_settings_that_cannot_be_right_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=rf"model\.engine\.local\.{message}"):
        LocalServers(**settings)
