import pytest
import torch

from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.types import ConfigurationError

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32}


def test_every_character_is_one_token_and_comes_back():
    tokenizer = CharacterPolicy("01+= \n", **TINY).load_tokenizer()
    text = "1+0 = 1\n\n"
    token_ids = tokenizer(text)["input_ids"]
    # <pad>, <eos> and <unk> come first: 0 is token 3, 1 is 4, + is 5, = is 6, the space 7, the new line 8.
    assert token_ids == [4, 5, 3, 7, 6, 7, 4, 8, 8]
    assert tokenizer.decode(token_ids) == text
    assert len(tokenizer) == 9


def test_a_character_outside_the_alphabet_is_unknown():
    tokenizer = CharacterPolicy("01", **TINY).load_tokenizer()
    assert tokenizer("0€1")["input_ids"] == [3, tokenizer.unk_token_id, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_the_model_has_the_shape_that_was_asked_for():
    model = CharacterPolicy("0123456789", hidden_size=32, num_layers=3, num_heads=4, max_positions=50).load_model(
        seed=0
    )
    assert model.get_input_embeddings().weight.shape == (13, 32)
    assert len(model.model.layers) == 3
    assert model.config.num_attention_heads == 4
    assert model.config.max_position_embeddings == 50
    # 8/3 of 32 is 85.3, rounded up to the next multiple of 64.
    assert model.config.intermediate_size == 128
    assert model.generation_config.eos_token_id == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_shares_the_embedding_where_that_is_wanted(tied):
    model = CharacterPolicy("01", **TINY, tie_embeddings=tied).load_model(seed=0)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_weights_are_those_of_the_seed_and_of_nothing_else():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    source = CharacterPolicy("01", **TINY)
    weights = [source.load_model(seed=seed).lm_head.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init_std", [0.02, 0.2])
def test_the_deviation_of_the_weights_is_that_of_the_settings(init_std):
    model = CharacterPolicy(hidden_size=128, init_std=init_std).load_model(seed=0)
    # 128 x 62 numbers: the deviation of their deviation is 1/sqrt(2 x 7936) = 0.8 %, of which this is six.
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(init_std, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"characters": "0120"}, r"model\.policy\.characters names '0' twice\."),
        (
            {"hidden_size": 18, "num_heads": 4},
            r"model\.policy\.hidden_size must be an even multiple of .* \(4\), got 18",
        ),
        ({"hidden_size": 12, "num_heads": 4}, r"model\.policy\.hidden_size must be an even multiple"),
        ({"init_std": 0.0}, r"model\.policy\.init_std must be > 0, got 0\.0"),
        ({"init_std": float("nan")}, r"model\.policy\.init_std must be > 0, got nan"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_when_the_object_is_built(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        CharacterPolicy(**settings)


@pytest.mark.parametrize("name", [*TINY, "intermediate_size"])
@pytest.mark.parametrize("size", [0, -16])
def test_a_size_below_one_is_refused_by_key(name, size):
    with pytest.raises(ConfigurationError, match=f"model.policy.{name} must be >= 1, got {size}"):
        CharacterPolicy(**{**TINY, name: size})
