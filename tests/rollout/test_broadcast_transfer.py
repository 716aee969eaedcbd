"""Weights that are broadcast to servers arrive exactly, also where one is lost on the way."""

import time
from functools import partial
from itertools import count

import pytest
import replay
import torch
from fake_server import EOS, serving
from real_server import ONE_BY_ONE, kill, needs_vllm

from grpo_lightning.policy import NamedWeights
from grpo_lightning.rollout import VLLMServerEngine, broadcast_transfer
from grpo_lightning.rollout.broadcast_transfer import BroadcastTransfer
from grpo_lightning.rollout.file_transfer import FileTransfer
from grpo_lightning.rollout.local_servers import LocalServers
from grpo_lightning.rollout.server import ServerError
from grpo_lightning.rollout.weight_sync import WeightSyncError
from grpo_lightning.types import ConfigurationError, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=6)


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture
def servers(model, tokenizer):
    with serving(model, tokenizer) as first, serving(model, tokenizer) as second:
        yield first, second


def engine_of(servers, model, tokenizer, *, patience_seconds=10):
    urls = [server.url for server in servers]
    engine = VLLMServerEngine(urls, transfer="broadcast", max_requests=4, patience_seconds=patience_seconds)
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 5)
    return engine


@pytest.fixture
def engine(servers, model, tokenizer):
    return engine_of(servers, model, tokenizer)


@pytest.fixture
def draw(engine, ragged_requests, coordinates):
    return partial(engine.generate, ragged_requests, SAMPLING, coordinates)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So that a tiny model has several."""
    monkeypatch.setattr(broadcast_transfer, "_PART_BYTES", 10_000)


@torch.no_grad()
def move(model, engine, version):
    for parameter in model.parameters():
        parameter.add_(1e-6)
    engine.update_weights(NamedWeights(model), version)


def weights_of(server):
    return dict(server.worker.model_runner.get_model().named_parameters())


def test_every_server_gets_every_bit(servers, engine, draw, model):
    for version in (5, 6):
        assert {completion.weight_version for completion in draw()} == {version}
        for server in servers:
            assert all(torch.equal(weights_of(server)[name], weight) for name, weight in model.named_parameters())
        move(model, engine, version + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_arrives_exactly(servers, make_model, tokenizer, dtype):
    model = make_model(dtype=dtype)
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(0.1, dtype=dtype)))  # of no dimension
    model.register_parameter("nothing", torch.nn.Parameter(torch.empty(0, 3, dtype=dtype)))
    for server in servers:
        server.model = model
        server.start()
    engine = engine_of(servers, model, tokenizer)
    engine._await_servers()
    engine.synchronise()
    for server in servers:
        assert all(torch.equal(weights_of(server)[name], weight) for name, weight in model.named_parameters())


def test_the_group_is_made_once(servers, engine, draw, model):
    draw()
    groups = [server.worker.transfer_group for server in servers]
    move(model, engine, 6)
    draw()
    assert [server.worker.transfer_group for server in servers] == groups
    assert groups[0].name == groups[1].name


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_that_was_started_again_gets_the_weights_in_a_new_group(servers, draw, which, caplog):
    caplog.set_level("INFO")
    expected = draw()
    servers[which].start()
    assert draw() == expected
    assert "thrown away" not in caplog.text  # nothing was sent in the old one


def when_receiving(server, what, *, times=1, after=2):
    """Has a server do something in the place of taking a part of the weights, after some parts."""
    calls, receive = count(), server.worker.receive_broadcast

    def receive_or(*arguments):
        return what() if after <= next(calls) < after + times else receive(*arguments)

    server.worker.receive_broadcast = receive_or


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_that_is_started_again_while_weights_are_sent_gets_them(servers, draw, which, caplog):
    caplog.set_level("INFO")
    when_receiving(servers[which], lambda: [servers[which].start(), []["no answer" == ""]])
    completions = draw()
    assert {completion.weight_version for completion in completions} == {5}
    assert "A rollout is thrown away and drawn again from weights that are sent again: " in caplog.text


def test_a_server_that_freezes_while_weights_are_sent_ends_the_run_when_patience_does(
    servers, model, tokenizer, ragged_requests, coordinates
):
    engine = engine_of(servers, model, tokenizer, patience_seconds=3)
    frozen = servers[1].is_frozen

    def freeze():
        frozen.set()
        while frozen.is_set():
            time.sleep(0.01)

    when_receiving(servers[1], freeze)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"model\.engine\.urls: no answer for 3 s: "):
        engine.generate(ragged_requests, SAMPLING, coordinates)
    assert time.monotonic() - started < 15  # the machine may be busy
    frozen.clear()


def test_a_tensor_that_is_changed_on_its_way_is_noticed(servers, draw):
    group = servers[1].worker
    receive = group.receive_weights
    group.receive_weights = lambda named, version: receive(((n, t + (n == "model.norm.weight")) for n, t in named), 5)
    with pytest.raises(WeightSyncError, match=r"1 have other values \(model\.norm\.weight\)"):
        draw()


@pytest.mark.parametrize(("settings", "device", "expected"), [
    ({"urls": ["http://127.0.0.1:1"]}, "cpu", FileTransfer),
    ({"urls": ["http://127.0.0.1:1"]}, "cuda", BroadcastTransfer),
    ({"urls": ["http://127.0.0.1:1", "http://rollouts:1"]}, "cpu", BroadcastTransfer),
    ({"urls": ["http://rollouts:1"], "exchange_folder": "/tmp"}, "cuda", FileTransfer),
    ({"urls": ["http://rollouts:1"], "transfer": "files"}, "cuda", FileTransfer),
    ({"urls": ["http://127.0.0.1:1"], "transfer": "broadcast"}, "cpu", BroadcastTransfer),
])  # fmt: skip
def test_which_way_is_taken(settings, device, expected, model, tokenizer, monkeypatch):
    engine = VLLMServerEngine(**settings)
    engine.setup(model, tokenizer, EOS)
    monkeypatch.setattr(type(model), "device", torch.device(device))
    assert type(engine._make_transfer()) is expected


def test_a_folder_is_refused_where_nothing_goes_through_files():
    with pytest.raises(ConfigurationError, match=r"model\.engine\.exchange_folder is for .*transfer: files, got broad"):
        VLLMServerEngine(["http://a:1"], transfer="broadcast", exchange_folder="/tmp")


class KillingEngine(VLLMServerEngine):
    """Kills all processes of its server, by SIGKILL, when half of the weights of the third sync are sent."""

    num_sent = 0

    def send(self, named_tensors, version):
        self.num_sent += 1

        def until_killed():
            for i, named in enumerate(named_tensors):
                if self.num_sent == 3 and i == 12:
                    kill(self)
                yield named

        super().send(until_killed(), version)


@needs_vllm
def test_a_VLLM_that_is_killed_while_weights_are_broadcast_changes_nothing(caplog):
    caplog.set_level("INFO")
    settings = {"head_dim": 32, "iterations": 4, "lr": 1e-3}
    ways = {"files": VLLMServerEngine, "broadcast": KillingEngine}
    (by_files, _), (killed, module) = (
        replay.run(engine=partial(kind, local=ONE_BY_ONE, max_requests=1, transfer=way), **settings)
        for way, kind in ways.items()
    )
    assert torch.equal(by_files.weights[-1], killed.weights[-1])
    assert module.engine.num_sent == 5
    assert "A vLLM server has ended; it is started again." in caplog.messages


@needs_vllm
def test_two_VLLM_servers_get_every_bit(tokenizer, make_model, ragged_requests, coordinates):
    model = make_model(dtype=torch.float32, head_dim=32)
    local = LocalServers(devices=["", ""], kv_cache_gib=0.1, arguments=["--enforce-eager"])
    engine = VLLMServerEngine(local=local, transfer="broadcast")
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 0)
    try:
        for version in (0, 1):
            drawn = engine.generate(ragged_requests, SAMPLING, coordinates)  # compares every tensor that they hold
            assert {completion.weight_version for completion in drawn} == {version}
            move(model, engine, version + 1)
        assert len(engine.held()) == 2
    finally:
        engine.close()
