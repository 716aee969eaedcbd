from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from grpo_lightning.accounting import Group, ModelSize, decode_bytes, forward_flops, update_flops
from grpo_lightning.policy import LoRA

SIZE = ModelSize(
    layer_weights=100,
    trained_layer_weights=100,
    head_weights=50,
    trained_head_weights=50,
    num_layers=2,
    attention_width=3,
    key_width=2,
    weight_bytes=4,
)
GROUP = Group(prompt=2, completions=(1, 3))
LLAMA = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip


def test_a_groups_forward_is_worked_by_hand():
    # Fed: 2 of the prompt, 0 and 2 of the completions. Keys: 1 + 2, and 3 + 4. States through the head: 1 + 0 + 2.
    assert forward_flops(SIZE, GROUP) == 2 * 100 * 4 + 4 * 2 * 3 * 10 + 2 * 50 * 3


def test_an_update_is_three_forwards_of_every_group():
    assert update_flops(SIZE, [GROUP, GROUP]) == 6 * forward_flops(SIZE, GROUP)
    assert update_flops(SIZE, []) == 0


def test_frozen_weights_need_no_gradient():
    frozen = replace(SIZE, trained_layer_weights=7, trained_head_weights=0)
    # Of the third forward, 4 tokens meet 93 weights less, 3 states none of the head's 50.
    assert update_flops(frozen, [GROUP]) == update_flops(SIZE, [GROUP]) - 2 * 93 * 4 - 2 * 50 * 3


def test_decoding_is_worked_by_hand():
    # 2 steps read 150 weights each. Step 1 reads 2 tokens of the prompt and 1 own, step 2 reads 2 and 2: 7 tokens, with
    # keys and values of 2 entries in 2 layers. A second group of 3 and (2): 1 step, 3 + 1 tokens.
    assert decode_bytes(SIZE, [GROUP]) == 4 * (2 * 150 + 2 * 2 * 2 * 7)
    assert decode_bytes(SIZE, [GROUP, Group(prompt=3, completions=(2,))]) == 4 * (2 * 150 + 2 * 2 * 2 * (7 + 4))


def test_first_tokens_need_no_step():
    assert decode_bytes(SIZE, [Group(prompt=9, completions=(1, 1))]) == 0
    assert decode_bytes(SIZE, []) == 0


def test_a_shared_prompt_is_counted_once():
    one, two = Group(prompt=5, completions=(4,)), Group(prompt=5, completions=(4, 4))
    prompt = 2 * 100 * 5 + 4 * 2 * 3 * 15
    assert forward_flops(SIZE, two) == 2 * forward_flops(SIZE, one) - prompt - 2 * 50  # the prompt's state has one head
    assert two.num_tokens == 13


@pytest.mark.parametrize("tied", [True, False])
def test_a_llamas_size_is_worked_by_hand(tied):
    size = ModelSize.of(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).to(torch.bfloat16))
    # Queries and output are 8 x 24, keys and values 8 x 12; three matrices of 8 x 12.
    layer = 2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 12
    assert size == ModelSize(
        layer_weights=3 * layer,
        trained_layer_weights=3 * layer,
        head_weights=8 * 11,
        trained_head_weights=8 * 11,
        num_layers=3,
        attention_width=24,
        key_width=12,
        weight_bytes=2,
    )


def test_what_an_adapter_adds_is_all_that_is_trained():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    plain = ModelSize.of(model)
    LoRA(rank=2, targets=["q_proj", "down_proj"]).adapt(model, seed=0)
    added = 3 * 2 * ((8 + 24) + (12 + 8))
    assert ModelSize.of(model) == replace(
        plain,
        layer_weights=plain.layer_weights + added,
        trained_layer_weights=added,
        trained_head_weights=0,
    )


def test_positions_are_no_matrix():
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1)
    size = ModelSize.of(GPT2LMHeadModel(config))
    # Attention 8 x 24 and 8 x 8, the network 8 x 32 twice.
    assert (size.layer_weights, size.key_width) == (2 * (8 * 24 + 8 * 8 + 2 * 8 * 32), 8)


def test_weights_that_are_not_always_used_are_not_counted():
    assert ModelSize.of(MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2))) is None


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_the_count_is_what_torch_counts(lora):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager"))
    if lora is not None:
        lora.adapt(model, seed=0)
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=torch.arange(6)[None], use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    # torch counts the products of all 6 x 6 queries and keys where 21 are needed, and the head of every token: 6 where
    # a prompt of 6 with a completion of one token needs 1.
    size, group = ModelSize.of(model), Group(prompt=6, completions=(1,))
    attention, head = 4 * 3 * 24 * (36 - 21), 5 * 2 * size.head_weights
    assert forward.get_total_flops() == forward_flops(size, group) + attention + head
    # The frozen first layer's queries, keys and values (8 x 24 and twice 8 x 12) hand on no gradient.
    handed_on = 0 if lora is None else 2 * 6 * (8 * 24 + 2 * 8 * 12 + 3 * 8 * 2)
    total = update_flops(size, [group]) + 3 * attention + (3 if lora is None else 2) * head - handed_on
    assert forward.get_total_flops() + backward.get_total_flops() == total
