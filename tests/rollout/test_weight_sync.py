"""Engines with a copy of the weights: what goes wrong on the way, or afterwards, is noticed before the next rollout."""

from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from adapters import adapted

from grpo_lightning.policy import NamedWeights, adapter_weights, is_adapted
from grpo_lightning.policy.adaptation import adapted_layers, merge
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.rollout.weight_receiver import WeightReceiver
from grpo_lightning.rollout.weight_sync import LOGPROB_TOLERANCE, WeightCopyEngine, WeightSyncError, disagreement
from grpo_lightning.types import SamplingParams

EOS = frozenset({1})
SAMPLING = SamplingParams(max_new_tokens=12)
STALE = "model.layers.1.self_attn.k_proj.weight"


class CopyEngine(WeightCopyEngine):
    """The in-process engine on a second model, which takes over weights as a worker of vLLM does."""

    def setup(self, model, tokenizer, eos_token_ids):
        super().setup(model, tokenizer, eos_token_ids)
        self.copy = deepcopy(model)
        if is_adapted(self.copy):
            merge(self.copy)
        for parameter in self.copy.parameters():
            parameter.data.zero_()
        self.copy.load_weights = self.load_weights
        self.worker = object.__new__(WeightReceiver)
        self.worker.model_runner = SimpleNamespace(get_model=lambda: self.copy)
        self.inner = InProcessEngine()
        self.inner.setup(self.copy, tokenizer, eos_token_ids)

    def load_weights(self, named_tensors):
        parameters = dict(self.copy.named_parameters())
        for name, tensor in named_tensors:
            parameters[name].copy_(tensor)

    def send(self, named_tensors, version):
        self.worker.receive_weights(named_tensors, version)

    def keep(self, names, version):
        self.worker.keep_weights(names, version)

    def held(self):
        return [self.worker.report_weights()]

    def draw(self, requests, sampling, coordinates):
        self.inner.update_weights((), self.version)
        return self.inner.generate(requests, sampling, coordinates)


@pytest.fixture(params=["CopyEngine", *(["VLLMEngine"] if find_spec("vllm") else [])])
def make_copy_engine(request, engine_cases):
    """Makes engines with a copy, and gives the model that each computes with."""
    if request.param == "CopyEngine":
        return CopyEngine, lambda engine: engine.copy
    return engine_cases["VLLMEngine"].make, lambda engine: engine._started.collective_rpc(
        lambda worker: worker.model_runner.get_model()
    )[0]


@pytest.fixture(params=["CopyEngine", *(["VLLMEngine", "VLLMServerEngine"] if find_spec("vllm") else [])])
def make_any_copy_engine(request, engine_cases):
    """Makes engines with a copy, wherever it is."""
    return CopyEngine if request.param == "CopyEngine" else engine_cases[request.param].make


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.float32, head_dim=32)


@pytest.fixture
def synced(make_copy_engine, model, tokenizer, coordinates, ragged_requests):
    """An engine that has drawn once, the model that it draws from, and a way to draw again."""
    make, model_of = make_copy_engine
    engine = make()
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 0)

    def draw(sampling=SAMPLING):
        return engine.generate(ragged_requests, sampling, coordinates)

    draw()
    copy = model_of(engine)
    load_weights = copy.load_weights
    yield SimpleNamespace(engine=engine, copy=copy, load_weights=load_weights, draw=draw)
    copy.load_weights = load_weights
    engine.close()


def update(model, engine=None, version=1, *, size=1e-6):
    """A step far too small for any log-prob to tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
    if engine is not None:
        engine.update_weights(NamedWeights(model), version)


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_logprobs_are_the_policys_after_every_update(make_any_copy_engine, make_model, tokenizer, coordinates,
                                                     ragged_requests, teacher_forced, is_tied,
                                                     has_adapter):  # fmt: skip
    model = make_model(dtype=torch.float32, head_dim=32)
    model.config.tie_word_embeddings = is_tied
    model.tie_weights()
    if has_adapter:
        adapted(model, std=0.05)
    engine = make_any_copy_engine()
    engine.setup(model, tokenizer, EOS)
    for version in range(6):
        update(model, engine, version, size=0.02)
        completions = engine.generate(ragged_requests, SAMPLING, coordinates)
        assert {completion.weight_version for completion in completions} == {version}
        prompts = [request.token_ids for request in ragged_requests for _ in range(request.num_completions)]
        errors_N = torch.cat([
            torch.tensor(completion.sampler_logprobs) - teacher_forced(model, prompt, completion.token_ids)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]).abs()  # fmt: skip
        assert errors_N.mean() < 1e-5  # two orders of summation in fp32
        assert errors_N.max() < 3e-5
    engine.close()


def test_the_copy_of_a_policy_with_an_adapter_is_a_plain_model(model, tokenizer, coordinates, ragged_requests):
    """It is sent what the adapter makes of the weights; the check of log-probs compares it with the policy."""
    engine, _ = CopyEngine(), adapted(model)
    engine.setup(model, tokenizer, EOS)
    for version in range(2):
        engine.update_weights(NamedWeights(model), version)
        assert engine.generate(ragged_requests, SAMPLING, coordinates)
        with torch.no_grad():
            for weight in adapter_weights(model).values():
                weight.add_(0.1)
    with pytest.raises(WeightSyncError):
        engine.generate(ragged_requests, SAMPLING, coordinates)
    assert not any("lora" in name for name, _ in engine.copy.named_parameters())


def test_weights_are_sent_only_where_they_have_changed(synced, model):
    sent = []
    synced.copy.load_weights = lambda named: (sent.append(1), synced.load_weights(named))[1]
    synced.draw()
    assert not sent
    update(model, synced.engine)
    synced.draw()
    synced.draw()
    assert sent == [1]


@pytest.fixture
def sent(any_synced):
    """The names of the tensors that were sent, sync by sync."""
    names = []

    def send(named, version):
        names.append([])
        any_synced.send(((n, t) for n, t in named if not names[-1].append(n)), version)

    any_synced.engine.send = send
    return names


def test_tensors_that_are_the_same_are_not_sent_again(any_synced, sent, model):
    with torch.no_grad():
        dict(model.named_parameters())[STALE].add_(1e-6)
    any_synced.engine.update_weights(NamedWeights(model), 1)
    completions = any_synced.draw()
    assert sent == [[STALE]]
    assert {completion.weight_version for completion in completions} == {1}
    update(model, any_synced.engine, version=2)
    any_synced.draw()
    assert len(sent[1]) == 21


def test_of_a_policy_with_an_adapter_only_adapted_weights_are_sent(any_synced, sent, model, tokenizer):
    adapted(model)
    any_synced.engine.setup(model, tokenizer, EOS)
    for version in range(1, 4):
        with torch.no_grad():
            for weight in adapter_weights(model).values():
                weight.add_(0.01)
        any_synced.engine.update_weights(NamedWeights(model), version)
        any_synced.draw()
    assert len(sent[0]) == 21
    assert sorted(sent[1]) == sorted(sent[2]) == sorted(f"{layer}.weight" for layer in adapted_layers(model))


def test_a_tensor_that_changed_in_the_copy_is_noticed_though_it_is_not_sent(synced, model):
    with torch.no_grad():
        dict(model.named_parameters())[STALE].add_(1e-6)
        next(synced.copy.parameters())[3, 5] += 1e-6
    synced.engine.update_weights(NamedWeights(model), 1)
    with pytest.raises(WeightSyncError, match=r"1 have other values \(model.embed_tokens.weight\)"):
        synced.draw()


def test_a_version_that_was_not_passed_on_is_noticed(synced, model):
    with torch.no_grad():
        dict(model.named_parameters())[STALE].add_(1e-6)
    synced.engine.update_weights(NamedWeights(model), 1)
    synced.engine.keep = lambda names, version: None
    with pytest.raises(WeightSyncError, match="20 are not of version 1"):
        synced.draw()


def test_after_a_disagreement_all_is_sent_again(synced, model):
    with torch.no_grad():
        next(synced.copy.parameters())[3, 5] += 1e-6
    with pytest.raises(WeightSyncError):
        synced.draw()
    assert synced.draw()


def test_an_update_that_nobody_announced_is_noticed(synced, model):
    update(model)
    with pytest.raises(WeightSyncError, match="21 have other values"):
        synced.draw()


def test_a_missing_sync_is_noticed(synced, model):
    update(model, synced.engine)
    synced.engine.send = lambda named_tensors, version: list(named_tensors)
    with pytest.raises(WeightSyncError, match=r"21 are not of version 1 \(model.embed_tokens.weight, "):
        synced.draw()


def test_half_a_sync_is_noticed(synced, model):
    update(model, synced.engine)
    synced.copy.load_weights = lambda named: synced.load_weights(islice(named, 10))
    with pytest.raises(WeightSyncError, match="11 are not of version 1"):
        synced.draw()


def test_a_single_tensor_that_was_not_written_is_noticed(synced, model):
    update(model, synced.engine)
    synced.copy.load_weights = lambda named: synced.load_weights((n, t) for n, t in named if n != STALE)
    with pytest.raises(WeightSyncError, match=rf"of 21 tensors, 1 have other values \({STALE}\)"):
        synced.draw()


def test_a_parameter_that_was_changed_afterwards_is_noticed(synced):
    with torch.no_grad():
        next(synced.copy.parameters())[3, 5] += 1e-6
    with pytest.raises(WeightSyncError, match=r"1 have other values \(model.embed_tokens.weight\)"):
        synced.draw()


def test_a_parameter_that_nothing_was_sent_for_is_noticed(make_copy_engine, model, tokenizer, coordinates):
    make, _ = make_copy_engine
    engine = make()
    engine.setup(model, tokenizer, EOS)
    engine.update_weights([(n, t) for n, t in NamedWeights(model) if "input_layernorm" not in n], 3)
    if isinstance(engine, CopyEngine):  # a vLLM that another test has started has had every tensor
        with pytest.raises(WeightSyncError, match="2 are parameters of the engine that no tensor came for"):
            engine.generate([], SAMPLING, coordinates)
    engine.close()


@pytest.mark.parametrize("temperature", [1.05, 0.9])
def test_a_wrong_temperature_is_noticed(synced, temperature):
    draw = synced.engine.draw
    synced.engine.draw = lambda requests, sampling, at: draw(requests, replace(sampling, temperature=temperature), at)
    with pytest.raises(WeightSyncError, match=r"log-probs .* differ from the policy's by 0\.\d+ on average"):
        synced.draw()


def test_logprobs_under_every_setting_pass(synced):
    synced.draw(replace(SAMPLING, temperature=0.7, min_new_tokens=6))
    synced.draw(replace(SAMPLING, top_k=5, top_p=0.9))
    synced.draw(replace(SAMPLING, temperature=0.0))


def test_every_kind_of_disagreement_is_said():
    # a agrees; b never came; c is old; d was overwritten.
    report = {"tensors": {"a": [4, 10], "c": [3, 30], "d": [4, None]}, "untouched": ["e"]}
    assert disagreement({"a": 10, "b": 20, "c": 30, "d": 40}, 4, report) == (
        "of 4 tensors, 1 did not arrive (b); 1 are not of version 4 (c); 1 have other values (d); "
        "1 are parameters of the engine that no tensor came for (e)."
    )
    assert disagreement({"a": 10}, 4, {"tensors": {"a": [4, 10]}, "untouched": []}) is None


@pytest.fixture
def any_synced(make_any_copy_engine, model, tokenizer, coordinates, ragged_requests):
    """An engine that has drawn once, what it sends and draws by, and a way to draw again."""
    engine = make_any_copy_engine()
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 0)

    def draw():
        return engine.generate(ragged_requests, SAMPLING, coordinates)

    draw()
    yield SimpleNamespace(engine=engine, send=engine.send, draws=engine.draw, draw=draw)
    engine.close()


@pytest.mark.parametrize(("sent", "complaint"), [
    (lambda named: (), "21 are not of version 1 "),
    (lambda named: islice(named, 10), "11 are not of version 1 "),
    (lambda named: ((n, t) for n, t in named if n != STALE), rf"1 are not of version 1 \({STALE}\)"),
    (lambda named: ((n, t + (n == STALE) * 1e-6) for n, t in named), rf"1 have other values \({STALE}\)"),
], ids=["missing sync", "half a sync", "a stale tensor", "a tensor that was changed on its way"])  # fmt: skip
def test_what_was_not_sent_is_noticed_at_once(any_synced, model, sent, complaint):
    update(model, any_synced.engine)
    any_synced.engine.send = lambda named, version: any_synced.send(sent(named), version)
    with pytest.raises(WeightSyncError, match=f"of 21 tensors, {complaint}"):
        any_synced.draw()


def test_a_missing_adapter_is_noticed_at_once(any_synced, model, tokenizer):
    plain = [(name, weight.detach().clone()) for name, weight in NamedWeights(model)]
    adapted(model)
    any_synced.engine.setup(model, tokenizer, EOS)
    any_synced.engine.update_weights(plain, 1)
    with pytest.raises(WeightSyncError, match=r"log-probs .* differ from the policy's by .* on average"):
        any_synced.draw()


def test_an_adapter_that_moves_without_a_word_is_noticed_at_once(any_synced, model, tokenizer):
    adapted(model)
    any_synced.engine.setup(model, tokenizer, EOS)
    any_synced.engine.update_weights(NamedWeights(model), 1)
    any_synced.draw()
    with torch.no_grad():
        next(iter(adapter_weights(model).values()))[0, 0] += 1e-6
    with pytest.raises(WeightSyncError, match=r"1 have other values \(.*lora_A.*\) than were sent, and no update was"):
        any_synced.draw()


def test_another_temperature_is_noticed_at_once(any_synced):
    any_synced.engine.draw = lambda requests, sampling, at: any_synced.draws(
        requests, replace(sampling, temperature=1.05), at
    )
    with pytest.raises(WeightSyncError, match=r"log-probs .* differ from the policy's by 0\.\d+ on average"):
        any_synced.draw()


def test_the_tolerance_is_that_of_the_coarser_precision(model, tokenizer, coordinates, ragged_requests, monkeypatch):
    """A policy that computes in bf16, under autocast or FSDP2's policy, and a copy that does in fp32."""
    engine = CopyEngine()
    engine.setup(model, tokenizer, EOS)
    engine.update_weights(NamedWeights(model), 0)
    draw = engine.draw

    def in_full_precision(*arguments):
        with torch.autocast("cpu", enabled=False):
            return draw(*arguments)

    engine.draw = in_full_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.generate(ragged_requests, SAMPLING, coordinates)
        monkeypatch.setitem(LOGPROB_TOLERANCE, torch.bfloat16, 1e-4)
        with pytest.raises(WeightSyncError, match=r"expected at most 0\.0001 in "):
            engine.generate(ragged_requests, SAMPLING, coordinates)
