"""No layout changes the result: each is held to the padded one, for every family."""

import copy

import pytest
import torch
from adapters import adapted
from exact_norms import in_double
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_lightning.batching import Layout, Packed, Padded, Row, SharedPrefix, usable_layout
from grpo_lightning.functional import segments
from grpo_lightning.policy import CharacterPolicy, Policy
from grpo_lightning.policy.loading import recompute_layers

CPU = torch.device("cpu")
TOKENS = {"vocab_size": 15, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SMALL = {
    **TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that the distributions are worth comparing
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    # The second layer sees four positions only.
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    ),
}
TRAINED = ["all", "adapter"]
LAYOUTS = {"padded": Padded(), "packed": Packed(), "shared_prefix": SharedPrefix()}
PROMPT_LENGTHS_AND_COMPLETIONS = [(5, (4, 1, 7)), (9, (2,)), (3, (6, 6)), (1, (1, 1, 3)), (9, (1,)), (5, (3, 2))]


def ragged_rows():
    """Groups of different sizes and lengths, all mixed up."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for slot, (prompt_length, lengths) in enumerate(PROMPT_LENGTHS_AND_COMPLETIONS):
        prompt = torch.randint(15, (prompt_length,), generator=generator)
        rows += [Row(slot, prompt, torch.randint(15, (length,), generator=generator)) for length in lengths]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


ROWS = ragged_rows()


def make_policy(family, dtype, trained="all"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]()
    model = in_double(model) if dtype is torch.float64 else model
    if trained == "adapter":
        adapted(model)
    return Policy(model, CharacterPolicy("0123456789+=").load_tokenizer())


def forward_and_backward(policy, layout, pieces=(tuple(range(12)),)):
    """The log-probabilities of each row, and the gradient of their weighted sum."""
    policy.zero_grad()
    logprobs = [None] * len(ROWS)
    for piece in pieces:
        scores = policy(layout.lay_out([ROWS[i] for i in piece], CPU), 0.8)
        for row_T, i in zip(scores.logprobs_BT, piece, strict=True):
            logprobs[i] = row_T[: len(ROWS[i].completion_ids)]
        weights = [torch.arange(len(ROWS[i].completion_ids)) - i / 3 for i in piece]
        sum((logprobs[i] * w).sum() for i, w in zip(piece, weights, strict=True)).backward()
    gradients = [p.grad.flatten() for p in policy.parameters() if p.requires_grad]
    assert all(gradient.any() for gradient in gradients)
    return torch.cat([row.detach() for row in logprobs]), torch.cat(gradients)


def assert_same(one, other, tolerance):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=tolerance)
    assert float((one[1] - other[1]).norm() / other[1].norm()) < tolerance


def tolerance_of(family, dtype):
    # Gemma 2's own attention, the padded one, takes its softmax in single precision whatever the model's.
    return 1e-5 if dtype is torch.float32 or family == "gemma2" else 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("trained", TRAINED)
def test_flat_layouts_agree_with_the_padded_one(trained, layout, family, dtype):
    policy = make_policy(family, dtype, trained)
    assert policy.follows_segments
    padded, flat = (forward_and_backward(policy, LAYOUTS[name]) for name in ("padded", layout))
    assert_same(flat, padded, tolerance_of(family, dtype))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_gradient_checkpointing_changes_nothing(dtype, tolerance, trained, layout, family):
    policy = make_policy(family, dtype, trained)
    plain = forward_and_backward(policy, LAYOUTS[layout])
    calls = []
    norm = next(m for name, m in policy.model.named_modules() if "norm" in name or "ln_1" in name)
    norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    recompute_layers(policy.model)
    assert_same(forward_and_backward(policy, LAYOUTS[layout]), plain, tolerance)
    assert calls == [True, True], "in the forward pass, and again in the backward pass"


@pytest.mark.parametrize("num_bins", [2, 5, len(ROWS)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_change_nothing(layout, num_bins):
    policy = make_policy("qwen2", torch.float64)
    whole = forward_and_backward(policy, LAYOUTS["padded"])
    bins = LAYOUTS[layout].bins(ROWS, num_bins)
    assert len(bins) == num_bins
    assert_same(forward_and_backward(policy, LAYOUTS[layout], bins), whole, 1e-10)
    pieces = LAYOUTS[layout].pieces(ROWS, 14)
    assert len(pieces) > 2
    assert_same(forward_and_backward(policy, LAYOUTS[layout], pieces), whole, 1e-10)


@pytest.mark.parametrize("limits", [(0, 2**24), (0, 0), (60, 2**24)], ids=str)
def test_blocks_of_any_size_change_nothing(limits, monkeypatch):
    """Large batches fall into many blocks of attention; here small ones do."""
    monkeypatch.setattr(segments, "MAX_MIXED_AREA", limits[0])
    monkeypatch.setattr(segments, "MAX_AREA", limits[1])
    policy = make_policy("qwen2", torch.float64)
    assert len(SharedPrefix().lay_out(ROWS, CPU).segments.blocks) > 1
    expected = forward_and_backward(policy, LAYOUTS["padded"])
    assert_same(forward_and_backward(policy, SharedPrefix()), expected, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_neighbour_changes_nothing(layout):
    policy = make_policy("llama", torch.float64)
    before = policy(LAYOUTS[layout].lay_out(ROWS, CPU), 1.0).logprobs_BT
    other = [row._replace(completion_ids=row.completion_ids.flip(0) + 0) if i else row for i, row in enumerate(ROWS)]
    other = [row._replace(prompt_ids=(row.prompt_ids + 1) % 15) if row.slot != ROWS[0].slot else row for row in other]
    after = policy(LAYOUTS[layout].lay_out(other, CPU), 1.0).logprobs_BT
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-13)
    assert not torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_token_each_is_a_batch_too(layout):
    policy = make_policy("llama", torch.float64)
    rows = [Row(0, torch.tensor([4]), torch.tensor([5])), Row(0, torch.tensor([4]), torch.tensor([6]))]
    scores = policy(LAYOUTS[layout].lay_out(rows, CPU), 1.0)
    logprobs_V = policy.model(input_ids=torch.tensor([[4]])).logits[0, 0].log_softmax(-1)
    torch.testing.assert_close(scores.logprobs_BT.flatten(), logprobs_V[[5, 6]], rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_keeps_its_own_attention_outside(family):
    policy = make_policy(family, torch.float64)
    attention = policy.model.config._attn_implementation
    with torch.no_grad():
        before = policy.model(input_ids=torch.tensor([[3, 4, 5]])).logits
        policy(SharedPrefix().lay_out(ROWS, CPU), 1.0)
        assert policy.model.config._attn_implementation == attention
        assert torch.equal(policy.model(input_ids=torch.tensor([[3, 4, 5]])).logits, before)


def test_a_second_policy_of_a_model_changes_nothing():
    policy = make_policy("llama", torch.float64)
    before = policy(SharedPrefix().lay_out(ROWS, CPU), 1.0).logprobs_BT
    Policy(policy.model, policy.tokenizer)
    assert torch.equal(policy(SharedPrefix().lay_out(ROWS, CPU), 1.0).logprobs_BT, before)
    assert policy.model.config._attn_implementation == "sdpa"


def test_distinct_tokens_alone_go_through_the_model():
    sizes = {name: layout.lay_out(ROWS, CPU).input_ids_RL.numel() for name, layout in LAYOUTS.items()}
    prompts = sum(length for length, _ in PROMPT_LENGTHS_AND_COMPLETIONS)
    completions = sum(sum(lengths) - len(lengths) for _, lengths in PROMPT_LENGTHS_AND_COMPLETIONS)
    repeated = sum(length * len(lengths) for length, lengths in PROMPT_LENGTHS_AND_COMPLETIONS)
    assert sizes == {"padded": 12 * 12, "packed": repeated + completions, "shared_prefix": prompts + completions}


class TestFallback:
    def test_a_model_that_takes_no_segments_is_padded_which_is_said(self):
        class Deaf(LlamaForCausalLM):
            pass

        policy = make_policy("llama", torch.float64)
        model = copy.deepcopy(policy.model)
        for layer in model.model.layers:
            attend = layer.self_attn.forward
            layer.self_attn.forward = lambda *a, attend=attend, segments=None, **k: attend(*a, **k)
        deaf = Policy(model, policy.tokenizer)
        assert not deaf.follows_segments
        with pytest.warns(UserWarning, match=r"model\.layout: .* not follow SharedPrefix: its forwards are padded"):
            layout = usable_layout(SharedPrefix(), lambda: deaf.follows_segments)
        assert isinstance(layout, Padded)
        assert model.config._attn_implementation == "sdpa"

    def test_layers_that_are_no_attention_over_all_or_a_window_are_not_followed(self):
        policy = make_policy("llama", torch.float64)
        policy.model.config.layer_types = ["full_attention", "chunked_attention"]
        assert not policy.follows_segments

    def test_a_layout_that_needs_nothing_is_not_asked_about(self):
        layout = Padded()
        assert usable_layout(layout, lambda: pytest.fail("the model was asked")) is layout


def test_every_layout_is_held_to_this_contract():
    assert {type(layout) for layout in LAYOUTS.values()} == set(Layout.__subclasses__())
