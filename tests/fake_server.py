"""A server that speaks vLLM's protocol, and goes wrong when it is told to."""

import json
import threading
import time
from contextlib import contextmanager, suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch

from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.rollout.weight_receiver import WeightReceiver
from grpo_lightning.types import Coordinates, GenerationRequest, SamplingParams, Stream

EOS = frozenset({1})


class FakeServer(ThreadingHTTPServer):
    """What a vLLM server does, computed by the in-process engine on a model of its own.

    Args:
        model: Of the shape of the policy.
        tokenizer: The policy's.
    """

    daemon_threads = False  # `server_close` waits for what it computes
    request_queue_size = 64  # all requests of a rollout come at once; a connection that does not fit is reset

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.lock = model, tokenizer, threading.Lock()
        self.faults = []
        """What each of the next completions becomes: the name of a method of `Handler`, or "fine"."""
        self.is_frozen = threading.Event()
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
        self.worker.rank, self.worker.device = 0, torch.device("cpu")
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
            if fault == "freeze":
                self.server.is_frozen.set()
        while self.server.is_frozen.is_set():
            time.sleep(0.01)
        with self.server.lock:
            getattr(self, fault)(body)

    def fine(self, body):
        self.say(200, json.dumps(self.server.answer(self.path, body)))

    freeze = fine  # when it has thawed

    def restart(self, body):
        self.server.start()
        self.close_connection = True

    def slow(self, body):
        time.sleep(0.5)
        self.fine(body)

    def garbage(self, body):
        self.say(200, "<html>")

    def broken(self, body):
        self.say(500, "{}")

    def refuse(self, body):
        self.say(400, "{}")

    def without_logprobs(self, body):
        self.say(200, json.dumps({"choices": [{"token_ids": [5], "logprobs": None, "finish_reason": "stop"}]}))

    def not_a_number(self, body):
        logprobs = {"token_logprobs": [float("nan")]}
        self.say(200, json.dumps({"choices": [{"token_ids": [5], "logprobs": logprobs, "finish_reason": "stop"}]}))

    def aborted(self, body):
        answer = self.server.answer(self.path, body)
        answer["choices"][0]["finish_reason"] = "abort"
        self.say(200, json.dumps(answer))

    def sent_other_weights(self, body):
        """By another trainer, which does the same to the tensors as ours, but for one."""
        self.server.worker.receive_weights([("model.norm.weight", self.server.model.model.norm.weight + 1)], 5)
        self.fine(body)

    def say(self, status, answer):
        with suppress(ConnectionError):  # the client has hung up
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass


@contextmanager
def serving(model, tokenizer):
    """A server that answers inside."""
    server = FakeServer(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.is_frozen.clear()
        server.shutdown()
        server.server_close()
        thread.join()
