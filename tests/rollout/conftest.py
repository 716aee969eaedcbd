"""Engines, tiny models of several families, and a plain reference of what an engine must return."""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_lightning.functional.random import uniforms
from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.rollout import InProcessEngine, RolloutEngine, VLLMEngine, VLLMServerEngine
from grpo_lightning.rollout.local_servers import LocalServers
from grpo_lightning.rollout.server import Server
from grpo_lightning.types import Coordinates, GenerationRequest, Stream

VOCABULARY = 62
EOS = 1
SHAPE = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 160, "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": lambda **size: LlamaForCausalLM(LlamaConfig(**SHAPE, **size)),
    "qwen2": lambda **size: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **size, num_key_value_heads=2)),
    "qwen3": lambda **size: Qwen3ForCausalLM(Qwen3Config(**SHAPE, **size, num_key_value_heads=2)),
    "gemma": lambda **size: GemmaForCausalLM(GemmaConfig(**SHAPE, **size, num_key_value_heads=1)),
    "gpt2": lambda *, hidden_size, head_dim: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=hidden_size,
            n_layer=2,
            n_head=hidden_size // head_dim,
            n_positions=160,
            eos_token_id=EOS,
            bos_token_id=2,
        )
    ),
    # Windows shorter than the sequences: one kind of layer, and two.
    "mistral-sliding": lambda **size: MistralForCausalLM(
        MistralConfig(**SHAPE, **size, num_key_value_heads=2, sliding_window=6)
    ),
    "gemma2-sliding": lambda **size: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, **size, num_key_value_heads=2, sliding_window=6)
    ),
}


@dataclass(frozen=True)
class EngineCase:
    """How an engine is made for tests, and what it is good for."""

    make: Callable[[], RolloutEngine]
    dtype: torch.dtype = torch.float64
    head_dim: int = 8
    tolerance: float = 1e-9
    """Of log-probs, in `dtype`."""
    num_draws: int = 50_000
    """For tests of distributions."""
    draws_itself: bool = True
    """With our own code, so that a defect planted there must show."""
    not_tried: tuple[str, ...] = ()
    """Families that the engine computes differently from transformers, or that another engine has been tried with."""


_STARTED = {}
_LAUNCHED = {}
SERVER_ARGUMENTS = ["--enforce-eager", "--max-num-seqs", "64"]


def make_vllm_engine():
    """A `VLLMEngine` whose vLLM outlives it, since starting one takes seconds. Weights are sent to it all the same."""

    class SharedVLLMEngine(VLLMEngine):
        def start(self):
            key = (self._model.config.to_json_string(), self.dtype)
            if key not in _STARTED:
                _STARTED[key] = super().start()
            return _STARTED[key]

        def close(self):
            pass

    return SharedVLLMEngine(kv_cache_gib=0.1, enforce_eager=True)


def make_vllm_server_engine():
    """A `VLLMServerEngine` whose server outlives it, until one for another model is wanted."""

    class SharedVLLMServerEngine(VLLMServerEngine):
        def _launch(self):
            key = (self._model.config.to_json_string(), self.dtype)
            if key not in _LAUNCHED:
                stop_servers()
                super()._launch()
                _LAUNCHED[key] = self._launched
            self._launched = _LAUNCHED[key]
            self._servers = [Server(member.url) for member in self._launched.members]

        def close(self):
            pass

    return SharedVLLMServerEngine(local=LocalServers(kv_cache_gib=0.1, arguments=SERVER_ARGUMENTS))


def stop_servers():
    while _LAUNCHED:
        _LAUNCHED.popitem()[1].stop()


@pytest.fixture(scope="session", autouse=True)
def _no_server_stays():
    yield
    stop_servers()


ENGINES = {
    "InProcessEngine": EngineCase(InProcessEngine),
    "InProcessEngine that shares prompts": EngineCase(partial(InProcessEngine, share_prompts_from=0)),
    # vLLM computes in fp32, where two orders of summation leave 2e-5 of such peaked logits. Its CPU kernels know no
    # smaller heads, and with Gemma 2 they differ by 0.03, which the engine refuses.
    "VLLMEngine": EngineCase(
        make_vllm_engine,
        torch.float32,
        head_dim=32,
        tolerance=3e-5,
        num_draws=5_000,
        draws_itself=False,
        not_tried=("gemma2-sliding",),
    ),
    # The same vLLM in another process, asked over HTTP.
    "VLLMServerEngine": EngineCase(
        make_vllm_server_engine,
        torch.float32,
        head_dim=32,
        tolerance=3e-5,
        num_draws=600,
        draws_itself=False,
        not_tried=tuple(family for family in FAMILIES if family != "llama"),
    ),
}
"""How each engine of the package is made."""

RUNNABLE = [name for name in ENGINES if not name.startswith("VLLM") or importlib.util.find_spec("vllm")]


def concrete_engines(cls=RolloutEngine):
    """Names of the package's engines that are no base class."""
    for subclass in cls.__subclasses__():
        yield from concrete_engines(subclass)
        if not inspect.isabstract(subclass) and subclass.__module__.startswith("grpo_lightning."):
            yield subclass.__name__


@pytest.fixture(params=RUNNABLE)
def engine_case(request):
    """Every engine that can run here."""
    return ENGINES[request.param]


@pytest.fixture(scope="session")
def engine_cases():
    return ENGINES


@pytest.fixture
def make_engine(engine_case):
    return engine_case.make


@pytest.fixture(scope="session")
def known_engines():
    return SimpleNamespace(registered={name.split()[0] for name in ENGINES}, found=set(concrete_engines()))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    return CharacterPolicy().load_tokenizer()


@pytest.fixture(scope="session")
def make_model():
    """A tiny model of a family, peaked enough that its distribution is worth testing."""

    def make(family="llama", dtype=torch.float64, seed=0, head_dim=8):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = FAMILIES[family](hidden_size=4 * head_dim, head_dim=head_dim)
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.15 if parameter.ndim > 1 else 0.3).add_(0 if parameter.ndim > 1 else 0.7)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def coordinates():
    return Coordinates(seed=11, stream=Stream.TRAINING, iteration=3)


@pytest.fixture(scope="session")
def ragged_requests():
    """Five prompts of four lengths, one of them twice."""
    lengths = [4, 9, 1, 9, 6]
    prompts = [tuple(3 + (7 * i + 5 * j) % 59 for j in range(length)) for i, length in enumerate(lengths)]
    prompts.append(prompts[1])
    return [GenerationRequest(slot=20 + i, token_ids=p, num_completions=3) for i, p in enumerate(prompts)]


@pytest.fixture(scope="session")
def teacher_forced():
    """Log-probs of a completion's tokens: one plain forward of prompt and completion, no cache."""

    @torch.no_grad()
    def score(model, prompt, token_ids, temperature=1.0):
        logits_LV = model(input_ids=torch.tensor([[*prompt, *token_ids]]), use_cache=False).logits[0]
        logprobs_LV = (logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32)) / temperature).log_softmax(-1)
        return logprobs_LV[len(prompt) - 1 : -1].gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)

    return score


@pytest.fixture(scope="session")
def slow_tokens():
    """The tokens that a completion must have, drawn one forward at a time without cache, batch or block."""

    @torch.no_grad()
    def draw(model, prompt, slot, sample, sampling, coordinates, eos=frozenset({EOS})):
        token_ids = []
        while len(token_ids) < sampling.max_new_tokens and not (token_ids and token_ids[-1] in eos):
            logits_V = model(input_ids=torch.tensor([[*prompt, *token_ids]]), use_cache=False).logits[0, -1].double()
            if len(token_ids) < sampling.min_new_tokens:
                logits_V[list(eos)] = -torch.inf
            number = uniforms(
                seed=coordinates.seed, stream=coordinates.stream, iteration=coordinates.iteration,
                slots=torch.tensor(slot), samples=torch.tensor(sample), positions=torch.tensor(len(token_ids)),
            )  # fmt: skip
            ends_V = (logits_V / sampling.temperature).softmax(0).cumsum(0)
            token_ids.append(int((ends_V <= number * ends_V[-1]).sum()))
        return tuple(token_ids)

    return draw
