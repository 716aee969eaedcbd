"""A policy that is built without weights, and what comes in their place, in one process."""

import pickle

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_lightning.policy import CharacterPolicy, LoRA, PolicyRecipe, load_on_first_rank
from grpo_lightning.policy.source import PolicySource
from grpo_lightning.strategies.emptying import put_in, take_out
from grpo_lightning.types import ConfigurationError

SMALL = {"vocab_size": 15, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
FAMILIES = {
    # Rotations; those of a kind that has numbers of its own; masks as buffers and a tied head; a scale as a buffer.
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SMALL, **SIZES, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
            rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                             "original_max_position_embeddings": 16},
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, **SIZES, num_key_value_heads=2, head_dim=8)),
}  # fmt: skip
SETTINGS = [{}, {"gradient_checkpointing": True}, {"lora": LoRA(rank=2)}]


class OfFamily(PolicySource):
    def __init__(self, make):
        self.make = make

    def load_tokenizer(self):
        return CharacterPolicy("0123456789+=").load_tokenizer()

    def load_model(self, *, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()


def recipe_of(source, **settings):
    return PolicyRecipe(source=source, tokenizer=source.load_tokenizer(), seed=4, **settings)


def on_two_ranks(recipe, of_second=None):
    """What each rank has; what is sent goes through a pickle."""
    sent = []
    first = load_on_first_rank(recipe, is_first=True, broadcast=lambda found: sent.append(found) or found)
    received = pickle.loads(pickle.dumps(sent[0]))
    return first, load_on_first_rank(of_second or recipe, is_first=False, broadcast=lambda nothing: received)


@pytest.mark.parametrize("settings", SETTINGS, ids=["all", "computed again", "LoRA"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_built_without_weights_is_the_same_policy_with_them(family, settings):
    first, second = on_two_ranks(recipe_of(OfFamily(FAMILIES[family]), **settings))
    assert all(parameter.is_meta for parameter in second.parameters())
    assert second.traits == first.traits
    assert second.base_checksum == first.base_checksum
    input_ids = torch.tensor([[3, 4, 5, 6, 7]])
    expected = first.model(input_ids=input_ids).logits
    put_in(second, take_out(first))
    assert torch.equal(second.model(input_ids=input_ids).logits, expected)
    trained = [[name for name, p in policy.named_parameters() if p.requires_grad] for policy in (first, second)]
    assert trained[0] == trained[1]
    is_recomputed = any(getattr(module, "gradient_checkpointing", False) for module in second.modules())
    assert is_recomputed == ("gradient_checkpointing" in settings)


def on_meta():
    return torch.empty(0).is_meta


def test_the_precision_is_that_of_what_was_loaded():
    """A skeleton may not know it."""
    make = FAMILIES["llama"]
    first, second = on_two_ranks(recipe_of(OfFamily(lambda: make() if on_meta() else make().bfloat16())))
    for policy in (first, second):
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}


def test_what_the_first_rank_cannot_load_is_told_to_all():
    def make():
        if not on_meta():
            raise ConfigurationError("model.policy.path: no weights")
        return FAMILIES["llama"]()

    sent, recipe = [], recipe_of(OfFamily(make))
    with pytest.raises(ConfigurationError, match="no weights"):
        load_on_first_rank(recipe, is_first=True, broadcast=lambda found: sent.append(found) or found)
    with pytest.raises(ConfigurationError, match="no weights"):
        load_on_first_rank(recipe, is_first=False, broadcast=lambda nothing: pickle.loads(pickle.dumps(sent[0])))


def test_a_skeleton_of_another_model_is_refused():
    other = recipe_of(OfFamily(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **{**SIZES, "intermediate_size": 8}))))
    with pytest.raises(ConfigurationError, match=r"model\.policy: load_skeleton .*mlp\.down_proj\.weight among"):
        on_two_ranks(recipe_of(OfFamily(FAMILIES["llama"])), other)


def test_taken_out_and_put_in_a_model_is_what_it_was():
    model = FAMILIES["gpt2"]()
    model.transformer.h[0].requires_grad_(False)
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    weights = take_out(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    put_in(model, weights)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[n], w) and after[n].requires_grad == trained for n, (w, trained) in before.items())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_skeleton_of_a_character_policy_is_what_its_subclass_makes():
    class InDouble(CharacterPolicy):
        def load_model(self, *, seed):
            return super().load_model(seed=seed).double()

    for source, dtype in ((CharacterPolicy(), torch.float32), (InDouble(), torch.float64)):
        skeleton = source.load_skeleton()
        assert (skeleton.dtype, skeleton.device.type) == (dtype, "meta")
