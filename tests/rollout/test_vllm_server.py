"""`VLLMServerEngine` against a server that speaks vLLM's protocol, and goes wrong when it is told to."""

import json
import threading
import time
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from grpo_lightning.policy import NamedWeights
from grpo_lightning.rollout import InProcessEngine, VLLMServerEngine
from grpo_lightning.rollout.server import ServerError
from grpo_lightning.rollout.weight_receiver import WeightReceiver
from grpo_lightning.rollout.weight_sync import WeightSyncError
from grpo_lightning.types import ConfigurationError, Coordinates, GenerationRequest, SamplingParams, Stream

EOS = frozenset({1})
SAMPLING = SamplingParams(max_new_tokens=6)


class Server(ThreadingHTTPServer):
    """What a vLLM server does, computed by the in-process engine on a model of its own."""

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.lock = model, tokenizer, threading.Lock()
        self.faults = []
        """What each of the next completions becomes: "restart", "garbage", "broken", "refuse" or "fine"."""
        self.num_starts = self.num_syncs = 0
        self.start()

    def start(self):
        """As after a crash: other weights, another name."""
        copy = deepcopy(self.model)
        for parameter in copy.parameters():
            parameter.data.zero_()
        parameters = dict(copy.named_parameters())
        copy.load_weights = lambda named: [parameters[name].copy_(tensor) for name, tensor in named]
        self.num_starts += 1
        self.worker = object.__new__(WeightReceiver)
        self.worker.instance_name = f"start {self.num_starts}"
        self.worker.model_runner = SimpleNamespace(get_model=lambda: copy)
        self.engine = InProcessEngine()
        self.engine.setup(copy, self.tokenizer, EOS)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"

    def answer(self, path, body):
        if path == "/collective_rpc":
            self.num_syncs += body["method"].startswith("receive")
            return {"results": [getattr(self.worker, body["method"])(*body["args"])]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        request = GenerationRequest(slot=body["seed"] % 2**32, token_ids=tuple(body["prompt"]), num_completions=1)
        (completion,) = self.engine.generate(
            [request],
            SamplingParams(max_new_tokens=body["max_tokens"], temperature=body["temperature"]),
            Coordinates(seed=0, stream=Stream.TRAINING, iteration=0),
        )
        logprobs = {"token_logprobs": list(completion.sampler_logprobs)}
        return {"choices": [{"token_ids": list(completion.token_ids), "logprobs": logprobs, "finish_reason": "length"}]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.path == "/v1/completions" and self.server.faults else "fine"
            if fault == "restart":
                self.server.start()
                self.close_connection = True
                return
            answer = json.dumps(self.server.answer(self.path, body))
        self.send_response({"broken": 500, "refuse": 400}.get(fault, 200))
        self.end_headers()
        self.wfile.write(b"<html>" if fault == "garbage" else answer.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture
def server(model, tokenizer):
    server = Server(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def engine(server, model, tokenizer):
    engine = VLLMServerEngine([server.url], max_requests=4, patience_seconds=1)
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 5)
    return engine


@pytest.fixture
def expected(engine, ragged_requests, coordinates):
    return engine.generate(ragged_requests, SAMPLING, coordinates)


def test_completions_are_drawn_from_the_weights_that_were_sent(expected, model, ragged_requests, teacher_forced):
    prompts = [request.token_ids for request in ragged_requests for _ in range(request.num_completions)]
    for prompt, completion in zip(prompts, expected, strict=True):
        assert completion.weight_version == 5
        logprobs = teacher_forced(model, prompt, completion.token_ids).tolist()
        assert completion.sampler_logprobs == pytest.approx(logprobs, abs=1e-5)  # two orders of summation


@pytest.mark.parametrize("fault", ["restart", "garbage", "broken"])
def test_a_rollout_with_a_lost_answer_is_drawn_again_whole(server, engine, expected, ragged_requests, coordinates,
                                                           fault, capsys):  # fmt: skip
    server.faults = ["fine"] * 7 + [fault]
    syncs = server.num_syncs
    again = engine.generate(ragged_requests, SAMPLING, coordinates)
    assert [c.token_ids for c in again] == [c.token_ids for c in expected]
    assert {c.weight_version for c in again} == {5}
    assert server.num_syncs == syncs + 1


def test_a_server_that_was_started_again_between_rollouts_gets_the_weights(server, engine, expected, ragged_requests,
                                                                           coordinates):  # fmt: skip
    server.start()
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == expected


def test_a_server_that_is_lost_time_and_again_ends_the_run(server, engine, ragged_requests, coordinates):
    server.faults = ["restart"] * 1000
    with pytest.raises(ServerError, match="4 rollouts in turn were lost"):
        engine.generate(ragged_requests, SAMPLING, coordinates)


def test_a_request_that_the_server_refuses_is_the_users_mistake(server, engine, ragged_requests, coordinates):
    server.faults = ["refuse"]
    with pytest.raises(ConfigurationError, match=r"model\.engine\.urls: .*/v1/completions answered 400"):
        engine.generate(ragged_requests, SAMPLING, coordinates)


def test_a_server_whose_weights_somebody_else_changed_is_noticed(
    server, engine, expected, ragged_requests, coordinates
):
    with torch.no_grad():
        next(server.worker.model_runner.get_model().parameters())[0, 0] += 1
    with pytest.raises(WeightSyncError, match="1 have other values"):
        engine.generate(ragged_requests, SAMPLING, coordinates)


def test_a_server_that_is_not_there_is_said_in_time(model, tokenizer, ragged_requests, coordinates):
    engine = VLLMServerEngine(["http://127.0.0.1:9"], patience_seconds=0.6)
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 0)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"model\.engine\.urls: no answer for 0\.6 s: http://127\.0\.0\.1:9"):
        engine.generate(ragged_requests, SAMPLING, coordinates)
    assert time.monotonic() - started < 10  # the machine may be busy


@pytest.mark.parametrize(("settings", "message"), [
    ({"urls": []}, "urls must be one or several of http://host:port"),
    ({"urls": ["localhost:8000"]}, "urls must be one or several of http://host:port"),
    ({"urls": ["http://a:1"], "max_requests": 0}, "max_requests must be >= 1, got 0"),
    ({"urls": ["http://a:1"], "exchange_folder": "/nowhere"}, "exchange_folder: there is no folder '/nowhere'"),
])  # fmt: skip
def test_settings_that_cannot_be_right_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=f"model.engine.{message}"):
        VLLMServerEngine(**settings)
