import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from grpo_lightning.batching import Padded, Row
from grpo_lightning.policy import Policy, frozen_copy
from grpo_lightning.policy import policy as policy_module
from grpo_lightning.strategies import WHOLE

CPU = torch.device("cpu")
PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 4])]
COMPLETIONS = [torch.tensor([4, 1]), torch.tensor([5, 6, 7, 8]), torch.tensor([3])]
BATCH = Padded().lay_out([Row(i, *pair) for i, pair in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))], CPU)
SMALL = {"vocab_size": 15, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
FAMILIES = {
    # The plain head; logits capped after the head; dropout everywhere and a tied head.
    "llama": None,
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                     head_dim=8, intermediate_size=16, final_logit_softcapping=1.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def any_policy(request, source):
    make = FAMILIES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make() if make else source.load_model(seed=0)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # so that the distributions are worth comparing
    return Policy(model.double(), source.load_tokenizer())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_a_forward_of_each_sequence_by_itself(any_policy, temperature):
    scores = any_policy(BATCH, temperature)
    assert scores.logprobs_BT.shape == scores.entropy_BT.shape == (3, 4)
    model = copy.deepcopy(any_policy.model).eval()
    for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits_LV = model(input_ids=torch.cat((prompt, completion))[None]).logits[0].double() / temperature
        logprobs_TV = logits_LV.log_softmax(-1)[len(prompt) - 1 : -1]
        T = len(completion)
        expected_T = logprobs_TV.gather(1, completion[:, None]).squeeze(1)
        # Gemma 2's attention takes its softmax in single precision whatever the model's.
        tolerance = {"atol": 1e-5 if "Gemma" in type(model).__name__ else 1e-12, "rtol": 0}
        torch.testing.assert_close(scores.logprobs_BT[b, :T], expected_T, **tolerance)
        torch.testing.assert_close(scores.entropy_BT[b, :T], -(logprobs_TV.exp() * logprobs_TV).sum(-1), **tolerance)
        assert not scores.logprobs_BT[b, T:].any(), "0 where a completion has no token"
        assert not scores.entropy_BT[b, T:].any()


def test_the_head_of_each_family_is_known_with_its_cap(source):
    kinds = {name: make() if make else source.load_model(seed=0) for name, make in FAMILIES.items()}
    heads = {name: Policy(model, source.load_tokenizer())._head for name, model in kinds.items()}
    assert heads == {"llama": (None, True), "gemma2": (1.0, True), "gpt2": (None, True)}


def test_logits_that_a_model_changes_after_its_head_are_left_to_the_model(source):
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 3
            return output

    model = Scaled(source.load_model(seed=0).config).double()
    policy = Policy(model, source.load_tokenizer())
    assert not policy._head.is_plain
    scores = policy(BATCH, 1.0)
    logits_LV = model(input_ids=torch.tensor([[5, 6, 7, 4]])).logits[0]
    assert scores.logprobs_BT[0, 0].item() == pytest.approx(logits_LV[2].log_softmax(-1)[4].item(), abs=1e-12)


def test_the_vocabulary_is_never_spread_over_prompts_or_padding(policy, monkeypatch):
    rows = []
    scored = policy_module.head_logprobs_and_entropy
    monkeypatch.setattr(
        policy_module,
        "head_logprobs_and_entropy",
        lambda states, *a, **k: (rows.append(len(states)), scored(states, *a, **k))[1],
    )
    policy(BATCH, 1.0)
    assert rows == [2 + 4 + 1], "one row of logits for each completion token"


def test_gradients_reach_every_weight(any_policy):
    any_policy(BATCH, 1.0).logprobs_BT.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in any_policy.parameters())


def test_dropout_is_off_while_training(source):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(FAMILIES["gpt2"](), source.load_tokenizer())
    assert policy.training
    assert policy.model.training
    assert [m.p for m in policy.modules() if isinstance(m, nn.Dropout)]
    first, second = (policy(BATCH, 1.0).logprobs_BT for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("configured", "expected"), [(None, {1}), (1, {1}), (9, {1, 9}), ([7, 9], {1, 7, 9})], ids=str)
def test_ends_of_sequence_are_those_of_the_model_and_of_the_tokenizer(policy, configured, expected):
    policy.model.generation_config.eos_token_id = configured
    assert policy.eos_token_ids == expected


def test_a_saved_policy_is_loaded_by_transformers_alone(policy, tmp_path):
    policy.save(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert tokenizer("1+2=")["input_ids"] == policy.tokenizer("1+2=")["input_ids"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1


def copied(policy):
    reference = frozen_copy(policy)
    WHOLE.shard_copy(reference, of=policy)
    return reference


class TestFrozenCopy:
    def test_has_the_policys_weights_and_none_to_train(self, policy):
        reference = copied(policy)
        assert all(map(torch.equal, reference.model.state_dict().values(), policy.model.state_dict().values()))
        assert not any(p.requires_grad for p in reference.parameters())
        assert all(p.requires_grad for p in policy.parameters())

    def test_stays_what_it_was_while_the_policy_learns(self, policy):
        reference = copied(policy)
        before = reference(BATCH, 1.0).logprobs_BT
        assert torch.equal(before, policy(BATCH, 1.0).logprobs_BT)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1)
        assert torch.equal(reference(BATCH, 1.0).logprobs_BT, before)
        assert not torch.equal(policy(BATCH, 1.0).logprobs_BT, before)

    def test_has_the_policys_precision(self, policy):
        reference = copied(Policy(policy.model.double(), policy.tokenizer))
        assert {p.dtype for p in reference.parameters()} == {torch.float64}
