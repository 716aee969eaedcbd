"""`VLLMServerEngine` against a server that speaks vLLM's protocol, and goes wrong when it is told to."""

import threading
import time
from functools import partial

import pytest
import replay
import torch
from fake_server import EOS, serving

from grpo_lightning.policy import NamedWeights
from grpo_lightning.rollout import RolloutLostError, VLLMServerEngine
from grpo_lightning.rollout.local_servers import LocalServers
from grpo_lightning.rollout.server import Server, ServerError, SlowServerError, drawn_by
from grpo_lightning.rollout.weight_sync import WeightSyncError
from grpo_lightning.types import ConfigurationError, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=6)


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture
def server(model, tokenizer):
    with serving(model, tokenizer) as server:
        yield server


@pytest.fixture
def engine(server, model, tokenizer):
    engine = VLLMServerEngine([server.url], max_requests=4, patience_seconds=10)
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


FAULTS = ["restart", "garbage", "broken", "without_logprobs", "not_a_number", "aborted", "sent_other_weights"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rollout_with_a_lost_answer_is_drawn_again_whole(server, engine, expected, ragged_requests, coordinates,
                                                           fault, caplog):  # fmt: skip
    caplog.set_level("INFO")
    server.faults = ["fine"] * 7 + [fault]
    syncs = server.num_syncs
    again = engine.generate(ragged_requests, SAMPLING, coordinates)
    assert [c.token_ids for c in again] == [c.token_ids for c in expected]
    assert {c.weight_version for c in again} == {5}
    assert server.num_syncs == syncs + 1
    assert "A rollout is thrown away and drawn again from weights that are sent again: " in caplog.text


def test_the_completion_that_is_compared_was_drawn_from_weights_that_somebody_else_sent(
    server, engine, expected, ragged_requests, coordinates
):
    server.faults = ["sent_other_weights"]
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == expected


def test_a_server_that_is_started_again_while_it_is_sent_the_weights_gets_them_again(
    server, engine, expected, model, ragged_requests, coordinates, monkeypatch
):
    send, times = engine.send, iter(range(10))

    def interrupted(*arguments):
        send(*arguments)
        if next(times) == 0:
            server.start()

    monkeypatch.setattr(engine, "send", interrupted)
    engine.update_weights(NamedWeights(model), 5)
    engine.forget()
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == expected
    assert next(times) == 2


@pytest.fixture
def impatient(server, model, tokenizer):
    engine = VLLMServerEngine([server.url], max_requests=4, patience_seconds=2)
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 5)
    return engine


def test_a_server_that_freezes_is_given_up_and_taken_up_again(
    server, impatient, expected, ragged_requests, coordinates
):
    server.faults = ["fine"] * 7 + ["freeze"]
    thaw = threading.Timer(1.2, server.is_frozen.clear)  # after half the patience it is given up
    thaw.start()
    assert impatient.generate(ragged_requests, SAMPLING, coordinates) == expected
    thaw.join()


def test_a_server_that_stays_frozen_ends_the_run_when_patience_does(server, impatient, ragged_requests, coordinates):
    server.faults = ["freeze"]
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"model\.engine\.urls: no answer for 2 s: "):
        impatient.generate(ragged_requests, SAMPLING, coordinates)
    assert time.monotonic() - started < 10  # the machine may be busy


def test_nothing_is_asked_of_a_server_that_was_hung_up_on(server):
    asked = Server(server.url)
    asked.hang_up("no sign of life")
    with pytest.raises(ServerError, match="collective_rpc: no sign of life"):
        asked.instances(timeout=5)
    asked.take_up()
    assert asked.instances(timeout=5)


def test_a_slow_server_is_waited_for_while_it_gives_signs_of_life(server, model, tokenizer, engine, expected,
                                                                  ragged_requests, coordinates):  # fmt: skip
    server.faults = ["slow"]
    syncs = server.num_syncs
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == expected
    assert server.num_syncs == syncs


def test_a_server_that_is_too_slow_is_said_with_the_setting(server, model, tokenizer, ragged_requests, coordinates):
    engine = VLLMServerEngine([server.url], patience_seconds=5, request_timeout_seconds=0.3)
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 5)
    server.faults = ["slow"]
    with pytest.raises(SlowServerError, match=r"model\.engine\.request_timeout_seconds: .* longer than 0\.3 s"):
        engine.generate(ragged_requests, SAMPLING, coordinates)


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
    ({}, "needs either urls, of running servers, or local, to start some"),
    ({"urls": ["http://a:1"], "local": LocalServers()}, "needs either urls"),
    ({"urls": ["http://a:1"], "patience_seconds": 0}, "patience_seconds must be > 0 and finite, got 0"),
    ({"urls": ["http://a:1"], "patience_seconds": float("inf")}, "patience_seconds must be > 0 and finite, got inf"),
    ({"urls": []}, "urls must be one or several of http://host:port"),
    ({"urls": ["localhost:8000"]}, "urls must be one or several of http://host:port"),
    ({"urls": ["http://a:1"], "max_requests": 0}, "max_requests must be >= 1, got 0"),
    ({"urls": ["http://a:1"], "exchange_folder": "/nowhere"}, "exchange_folder: there is no folder '/nowhere'"),
])  # fmt: skip
def test_settings_that_cannot_be_right_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=f"model.engine[. ]{message}"):
        VLLMServerEngine(**settings)


def test_servers_that_the_run_starts_are_for_one_machine(monkeypatch, model, tokenizer, ragged_requests, coordinates):
    engine = VLLMServerEngine(local=LocalServers())
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 5)
    hosts = iter(["first", "second"])
    monkeypatch.setattr("grpo_lightning.rollout.vllm_server.gethostname", lambda: next(hosts))
    monkeypatch.setattr(engine, "_launch", lambda: None)
    monkeypatch.setattr(engine, "_patiently", list)
    with pytest.raises(ConfigurationError, match=r"model\.engine\.local starts servers for one machine"):
        engine.generate(ragged_requests, SAMPLING, coordinates)


def answer(token_ids=(4, 1), logprobs=(-0.5, 0.0), reason="stop"):
    choice = {"token_ids": list(token_ids), "logprobs": {"token_logprobs": list(logprobs)}, "finish_reason": reason}
    return {"choices": [choice]}


def test_what_a_completion_looks_like():
    assert drawn_by(answer(), limit=2) == ((4, 1), (-0.5, 0.0), True)
    assert drawn_by(answer(reason="length"), limit=2) == ((4, 1), (-0.5, 0.0), False)


@pytest.mark.parametrize("wrong", [
    {"error": "no"},
    {"choices": []},
    answer(token_ids=()),
    answer(token_ids=(4,)),
    answer(token_ids=(4, -1)),
    answer(logprobs=(-0.5, 0.1)),
    answer(logprobs=(-0.5, None)),
    answer(logprobs=(-0.5, float("nan"))),
    answer(reason="abort"),
    answer(reason=None),
    answer((4, 5, 1), (-1.0, -1.0, -1.0)),  # longer than was asked for
], ids=str)  # fmt: skip
def test_what_is_no_completion(wrong):
    assert drawn_by(wrong, limit=2) is None


# Drawing ahead


@torch.no_grad()
def move(model, engine, version):
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
    engine.update_weights(NamedWeights(model), version)


def test_what_was_begun_is_drawn_from_the_weights_of_then(engine, expected, model, ragged_requests, coordinates):
    draw = engine.begin(ragged_requests, SAMPLING, coordinates)
    move(model, engine, 6)
    assert draw() == expected
    after = engine.generate(ragged_requests, SAMPLING, coordinates)
    assert after != expected
    assert {c.weight_version for c in after} == {6}


def test_what_is_begun_is_begun_with_the_weights_of_now(server, engine, expected, model, ragged_requests, coordinates):
    move(model, engine, 6)
    draw = engine.begin(ragged_requests, SAMPLING, coordinates)
    assert draw() == engine.generate(ragged_requests, SAMPLING, coordinates) != expected
    assert server.num_syncs == 2


def test_the_beginning_of_a_completion_is_compared_before_the_rest_is_drawn(engine, expected, ragged_requests,
                                                                            coordinates):  # fmt: skip
    draw, asked = engine.draw, []

    def hotter(requests, sampling, at):
        asked.append([request.num_completions for request in requests])
        return draw(requests, SamplingParams(max_new_tokens=sampling.max_new_tokens, temperature=1.3), at)

    engine.draw = hotter
    with pytest.raises(WeightSyncError, match=r"log-probs .* differ from the policy's by 0\.\d+ on average"):
        engine.begin(ragged_requests, SAMPLING, coordinates)
    assert asked == [[1]]


def test_a_server_that_is_lost_at_the_beginning_gets_the_weights_again(server, engine, expected, ragged_requests,
                                                                       coordinates):  # fmt: skip
    server.faults = ["restart"]
    assert engine.begin(ragged_requests, SAMPLING, coordinates)() == expected


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_was_lost_in_is_lost(server, engine, expected, ragged_requests, coordinates, fault):
    draw = engine.begin(ragged_requests, SAMPLING, coordinates)
    server.faults = ["fine"] * 7 + [fault]
    with pytest.raises(RolloutLostError):
        draw()
    assert engine.generate(ragged_requests, SAMPLING, coordinates) == expected


def test_the_end_of_the_run_ends_what_is_being_drawn(server, engine, expected, ragged_requests, coordinates):
    draw = engine.begin(ragged_requests, SAMPLING, coordinates)
    server.faults = ["freeze"]
    closing = threading.Timer(0.2, engine.close)
    closing.start()
    with pytest.raises(RolloutLostError, match="the run has ended"):
        draw()
    closing.join()


def test_a_run_goes_on_when_a_server_is_started_again_in_a_rollout_that_is_drawn_ahead():
    policy = replay.TinyPolicy(torch.float32)
    model, tokenizer = policy.load_model(seed=3), policy.load_tokenizer()
    with serving(model, tokenizer) as server:

        class Engine(VLLMServerEngine):
            def begin(self, requests, sampling, coordinates):
                draw = super().begin(requests, sampling, coordinates)
                if coordinates.iteration == 3:
                    server.faults = ["fine", "restart"]
                return draw

        module, data, trainer, record = replay.make(
            objective="default", draw_ahead=True, engine=partial(Engine, [server.url]), iterations=5, dtype="float32"
        )
        trainer.fit(module, data)
    assert [metrics["sampler/staleness"] for metrics in record.metrics] == [0, 1, 1, 0, 1]
    # Two orders of summation, where the weights are the same.
    assert [metrics["sampler/logprob_difference"] < 1e-5 for metrics in record.metrics] == [
        True,
        False,
        False,
        True,
        False,
    ]
