import math

import pytest
import torch

from grpo_lightning.rollout.decoding_attention import attend, decoding_attention, join


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_attention_is_worked_by_hand():
    # Scores ln 1 and ln 3, so that the weights are 1/4 and 3/4 and the exponentials add up to 4.
    found = attend(torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([[8.0], [4.0]]), None)
    assert found.output.item() == pytest.approx(0.25 * 8 + 0.75 * 4)
    assert found.log_total.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_joined_parts_are_attention_over_all_keys(scale):
    query, keys, values = scale * random(3, 2, 4, 8), random(3, 2, 11, 8, seed=1), random(3, 2, 11, 5, seed=2)
    parts = [attend(query, keys[:, :, part], values[:, :, part], None) for part in (slice(7), slice(7, None))]
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=1.0)
    # float64 carries 16 digits; scores of up to 1e4 keep 12 of them.
    torch.testing.assert_close(join(*parts), expected, atol=1e-11, rtol=0)


def test_a_softcap_bounds_the_scores():
    query, keys, values = torch.tensor([[1.0]]), torch.tensor([[1e6], [0.0]]), torch.tensor([[1.0], [0.0]])
    # The scores are 2 tanh(inf) = 2 and 0.
    found = attend(query, keys, values, None, softcap=2.0).output.item()
    assert found == pytest.approx(math.exp(2) / (math.exp(2) + 1))


def test_a_model_has_its_own_attention_back_afterwards(make_model):
    model = make_model()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="in between"), decoding_attention(model.config):
        raise RuntimeError("in between")
    assert model.config._attn_implementation == before


def test_a_step_attends_as_the_model_does(make_model, family):
    model = make_model(family)
    inputs = {"input_ids": torch.tensor([[7], [9]]), "position_ids": torch.tensor([[3], [3]])}
    with decoding_attention(model.config.get_text_config()):
        found = model(**inputs, prefixes=None, attention_mask=torch.zeros(2, 1, 1, 1, dtype=model.dtype)).logits
    torch.testing.assert_close(found, model(**inputs).logits, atol=1e-12, rtol=0)
