import copy

import pytest
import torch
from adapters import adapted
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_lightning.policy import Policy, frozen_copy
from grpo_lightning.policy.adaptation import merge
from grpo_lightning.policy.lean_layers import LeanMLP, LeanRMSNorm, make_lean
from grpo_lightning.policy.loading import recompute_layers

LAYERS = 2
SMALL = {"vocab_size": 15, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZES = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama_with_biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=LAYERS, n_head=2, resid_pdrop=0,
                                               embd_pdrop=0, attn_pdrop=0)),
}  # fmt: skip
# Two norms in each layer and one at the end; Qwen3 has two more, of queries and keys. Gemma's multiply with 1 + w, and
# its activation is another one; GPT-2 has neither.
REPLACED = {
    "llama": (2 * LAYERS + 1, LAYERS),
    "llama_with_biases": (2 * LAYERS + 1, LAYERS),
    "qwen2": (2 * LAYERS + 1, LAYERS),
    "qwen3": (4 * LAYERS + 1, LAYERS),
    "gemma": (0, 0),
    "gpt2": (0, 0),
}
INPUT_IDS = torch.tensor([[5, 6, 7, 8, 9, 4], [3, 3, 10, 11, 14, 2]])


def make(family):
    """A model whose weights are all at random, those of the norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]().train()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def lean(model):
    make_lean(model)
    return model


def num_replaced(model):
    return tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in (LeanRMSNorm, LeanMLP))


@torch.no_grad()
def logits(model):
    return model(input_ids=INPUT_IDS, use_cache=False).logits


def gradients(model):
    model.zero_grad()
    model(input_ids=INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        # The gradient of a key's bias is zero but for rounding.
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6 * float(other[name].norm()) + 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_replaced_where_they_compute_the_same(family):
    assert num_replaced(lean(make(family))) == REPLACED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_untouched_model(family):
    plain, ours = make(family), lean(make(family))
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(ours), gradients(plain))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_in_half_precision_are_the_same_to_the_bit(family):
    plain, ours = make(family).bfloat16(), lean(make(family).bfloat16())
    assert num_replaced(ours) == REPLACED[family]
    assert torch.equal(logits(ours), logits(plain))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_under_autocast_logits_are_the_same_to_the_bit(family):
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = (model(input_ids=INPUT_IDS).logits for model in (make(family), lean(make(family))))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_keep_their_names_and_places(family):
    model = make(family)
    before = dict(model.named_parameters(remove_duplicate=False))
    keys = list(model.state_dict())
    make_lean(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(model.state_dict()) == keys
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_layers_stay_in_the_mode_that_they_are_in():
    for mode in (True, False):
        assert all(module.training == mode for module in lean(make("llama").train(mode)).modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_by_transformers(family, tmp_path):
    model = lean(make(family))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert num_replaced(loaded) == (0, 0)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)


def test_a_copy_has_weights_of_its_own():
    model = lean(make("qwen3"))
    before, other = logits(model), copy.deepcopy(model)
    assert num_replaced(other) == REPLACED["qwen3"]
    assert torch.equal(logits(other), before)
    for parameter in other.parameters():
        parameter.data.mul_(2)
    assert torch.equal(logits(model), before)


def test_a_second_time_changes_nothing():
    model = lean(make("llama"))
    modules = list(model.modules())
    make_lean(model)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("lean_first", [True, False], ids=["lean_first", "adapter_first"])
def test_an_adapter_trains_the_same_before_and_after(lean_first):
    plain, _ = adapted(make("llama"))
    ours = adapted(lean(make("llama")))[0] if lean_first else lean(adapted(make("llama"))[0])
    assert num_replaced(ours) == REPLACED["llama"]
    assert_same_gradients(gradients(ours), gradients(plain))
    merge(ours)
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-5, atol=1e-5)  # B A is added up beforehand


def test_layers_that_are_computed_again_give_the_same_gradients():
    plain, ours = make("qwen3"), lean(make("qwen3"))
    recompute_layers(ours)
    assert_same_gradients(gradients(ours), gradients(plain))


def test_a_policy_and_its_reference_have_them(policy):
    assert num_replaced(policy.model) == (2 * 2 + 1, 2)
    assert num_replaced(frozen_copy(policy).model) == (2 * 2 + 1, 2)
    assert isinstance(policy, Policy)


def test_a_model_without_weights_is_left_alone():
    with torch.device("meta"):
        model = FAMILIES["llama"]()
    make_lean(model)
    assert num_replaced(model) == (0, 0)


class OtherRMSNorm(nn.Module):
    """Norms that look like the one that is replaced."""

    def __init__(self, kind):
        super().__init__()
        self.weight, self.variance_epsilon, self.kind = nn.Parameter(torch.ones(16)), 1e-6, kind

    def forward(self, x):
        r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        match self.kind:
            case "the_same":
                return self.weight * (x * r).to(x.dtype)
            case "epsilon_outside_of_the_root":
                return self.weight * (x / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)).to(x.dtype)
            case "large_states_cut_off":
                return self.weight * (x.float().clamp(-90, 90) * r).to(x.dtype)
            case "cast_at_the_end":
                return (self.weight * (x.float() * r)).to(x.dtype)
            case "mean_taken_off":
                return self.weight * (x - x.mean(-1, keepdim=True)) * r


@pytest.mark.parametrize(
    "kind", ["the_same", "epsilon_outside_of_the_root", "large_states_cut_off", "cast_at_the_end", "mean_taken_off"]
)
def test_only_a_norm_of_that_formula_is_replaced(kind):
    model = make("llama")
    model.model.norm = OtherRMSNorm(kind)
    make_lean(model)
    assert isinstance(model.model.norm, LeanRMSNorm) == (kind == "the_same")


def test_a_layer_that_someone_changed_is_left_alone():
    model = make("llama")
    layer, other = model.model.layers
    layer.input_layernorm.forward = layer.input_layernorm.forward  # as one that was patched
    layer.mlp.register_forward_hook(lambda *_: None)
    other.mlp.scale = nn.Parameter(torch.ones(1))
    other.post_attention_layernorm.bias = nn.Parameter(torch.zeros(16))
    make_lean(model)
    assert num_replaced(model) == (REPLACED["llama"][0] - 2, 0)
    assert not isinstance(layer.input_layernorm, LeanRMSNorm)
    assert not isinstance(other.post_attention_layernorm, LeanRMSNorm)


def test_a_layer_with_another_activation_is_left_alone():
    model = make("llama")
    model.model.layers[1].mlp.act_fn = nn.GELU()
    make_lean(model)
    assert num_replaced(model) == (REPLACED["llama"][0], 1)


def test_a_weight_of_ones_does_not_hide_where_a_norm_casts():
    model = Olmo2ForCausalLM(Olmo2Config(**SIZES)).bfloat16()  # multiplies before it casts
    assert num_replaced(lean(model)) == (0, 2)


def test_a_projection_of_zeros_does_not_hide_another_activation():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.down_proj.weight)
    assert num_replaced(lean(model))[1] == 0


def test_a_layer_that_cannot_be_asked_is_left_alone():
    class Wrapped(nn.Module):
        def __init__(self, projection):
            super().__init__()
            self.projection = projection

        def forward(self, x):
            return self.projection(x)

    model = make("llama")
    model.model.layers[0].mlp.gate_proj = Wrapped(model.model.layers[0].mlp.gate_proj)  # has no in_features
    assert num_replaced(lean(model)) == (REPLACED["llama"][0], REPLACED["llama"][1] - 1)


def test_asking_uses_up_no_random_numbers():
    model = make("llama")
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, __, output: output + 0 * torch.rand(1))
    before = torch.get_rng_state()
    make_lean(model)
    assert torch.equal(torch.get_rng_state(), before)
