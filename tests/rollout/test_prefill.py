import pytest
import torch

from grpo_lightning.rollout.attention import AttentionPattern
from grpo_lightning.rollout.prefill import chunks, prefill
from grpo_lightning.types import ConfigurationError

PROMPTS = [(5,), (7, 8, 9), (11, 12, 13, 14, 15, 16, 17, 18, 19)]


@torch.no_grad()
def test_prompts_read_together_are_as_read_alone(make_model, family):
    model = make_model(family)
    pattern = AttentionPattern.of(model.config)
    together = prefill(model, PROMPTS, pattern)
    for i, prompt in enumerate(PROMPTS):
        alone = prefill(model, [prompt], pattern)
        logits_V = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        # Gemma 2's attention takes its softmax in single precision whatever the model's.
        tolerance = {"atol": 1e-6 if family.startswith("gemma2") else 1e-12, "rtol": 0}
        torch.testing.assert_close(together.logits_UV[i], logits_V, **tolerance)
        torch.testing.assert_close(alone.logits_UV[0], logits_V, **tolerance)
        for mine, own in zip(together.keys + together.values, alone.keys + alone.values, strict=True):
            torch.testing.assert_close(mine[i, :, -len(prompt) :], own[0], **tolerance)
            assert mine.isfinite().all()


@torch.no_grad()
def test_a_selected_prompt_is_a_copy(make_model):
    model = make_model()
    together = prefill(model, PROMPTS, AttentionPattern.of(model.config))
    one = together.select(1)
    assert torch.equal(one.keys[0][0], together.keys[0][1])
    assert torch.equal(one.logits_UV[0], together.logits_UV[1])
    assert one.keys[0].untyped_storage().nbytes() < together.keys[0].untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([10], [(0, 1)]),
        ([20_000], [(0, 1)]),
        ([1] * 100, [(0, 100)]),
        ([1, 4096, 4097, 8192, 8192], [(0, 2), (2, 3), (3, 4), (4, 5)]),
    ],
)
def test_prompts_are_cut_into_forwards_of_8192_padded_tokens(lengths, expected):
    assert [(part.start, part.stop) for part in chunks(lengths)] == expected


def test_layers_that_are_no_attention_are_refused(make_model):
    config = make_model("qwen2").config.__class__(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigurationError, match=r"model\.engine: .* has linear_attention layers"):
        AttentionPattern.of(config)


def test_patterns_of_the_families(make_model):
    patterns = {name: AttentionPattern.of(make_model(name).config) for name in ("llama", "qwen2", "mistral-sliding")}
    assert patterns["llama"] == patterns["qwen2"] == AttentionPattern(kinds=frozenset({"full_attention"}))
    assert patterns["mistral-sliding"] == AttentionPattern(kinds=frozenset({"sliding_attention"}), window=6)
    both = AttentionPattern(kinds=frozenset({"full_attention", "sliding_attention"}), window=6)
    assert AttentionPattern.of(make_model("gemma2-sliding").config) == both
