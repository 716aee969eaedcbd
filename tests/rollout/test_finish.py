import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_lightning.rollout.finish import FinishRules
from grpo_lightning.types import ConfigurationError, SamplingParams


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte, so that a character may take four tokens, and a special token behind them."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<end>"], eos_token="<eos>")


def rules(tokenizer, *stop, eos=frozenset({1})):
    return FinishRules(
        tokenizer, eos, SamplingParams(stop=stop), vocabulary=len(tokenizer) + 5, device=torch.device("cpu")
    )


def first_stop(finish, token_ids):
    """How many tokens are drawn until a stop string is seen, looking only where it is asked for."""
    for count, token in enumerate(token_ids, start=1):
        if finish.may_end_V[token] and finish.reaches_stop(token_ids[:count]):
            return count
    return None


def test_without_stop_strings_only_ends_of_sequence_are_looked_at(tokenizer):
    finish = rules(tokenizer, eos=frozenset({1, 4}))
    assert finish.may_end_V.nonzero().flatten().tolist() == [1, 4]
    assert finish.eos_E.tolist() == [1, 4]
    assert not finish.reaches_stop([5, 6])


def test_an_end_of_sequence_beyond_the_vocabulary_is_passed_over(tokenizer):
    assert rules(tokenizer, eos=frozenset({1, 10_000})).eos_E.tolist() == [1]


def test_only_tokens_with_the_last_character_are_looked_at(tokenizer):
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    finish = rules(tokenizer, "ab", "c")
    assert sorted(finish.may_end_V.nonzero().flatten().tolist()) == sorted([1, b, c])
    assert first_stop(finish, [b, a, a, b, c]) == 4
    assert first_stop(finish, [b, b, a]) is None


@pytest.mark.parametrize("stop", ["é", "日本", "x é y", "\n\n", " ", "🙂!", "a 🙂"])
@pytest.mark.parametrize("before", ["", "some text before it ", "日日日 ", "é"[:0] + "🙂🙂"])
def test_stop_strings_of_several_bytes_end_at_their_last_byte(byte_tokenizer, stop, before):
    text = before.replace(stop, "")
    token_ids = byte_tokenizer(text + stop + "after")["input_ids"]
    expected = (text + stop).index(stop) + len(stop)
    assert first_stop(rules(byte_tokenizer, stop), token_ids) == len((text + stop)[:expected].encode())


def test_a_stop_string_may_name_a_special_token(byte_tokenizer):
    token_ids = [*byte_tokenizer("some")["input_ids"], byte_tokenizer.convert_tokens_to_ids("<end>"), 5]
    assert first_stop(rules(byte_tokenizer, "<end>"), token_ids) == 5


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ConfigurationError, match=r"model\.sampling\.stop must hold non-empty strings"):
        rules(tokenizer, "a", "")
