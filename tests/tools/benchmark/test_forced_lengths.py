import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.benchmark.forced_lengths import Generation, completion_lengths

PAD, EOS = 0, 1


@pytest.fixture
def model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=6, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS, **sizes))


def test_a_length_counts_the_end_of_sequence():
    token_ids = torch.tensor([[3, EOS, PAD, PAD], [3, 4, 5, EOS], [3, 4, 5, 2], [EOS, PAD, PAD, PAD]])
    assert completion_lengths(token_ids, EOS).tolist() == [2, 4, 4, 1]


def generate(model, **settings):
    prompts = torch.tensor([[PAD, 2, 3]] * 4)
    return model.generate(input_ids=prompts, attention_mask=prompts.ne(PAD).long(), max_new_tokens=5, **settings)


def test_completions_end_where_they_are_told_to(model):
    generation = Generation(model, 5, EOS)
    generation.forced = (3, 1, 5, 2)
    completions = generate(model, do_sample=True)[:, 3:]
    assert generation.lengths == (3, 1, 5, 2)
    assert [EOS in row for row in completions.tolist()] == [True, True, False, True]  # the third is cut off


def test_without_lengths_they_end_by_themselves(model):
    generation = Generation(model, 5, EOS)
    expected = completion_lengths(generate(model, do_sample=False)[:, 3:], EOS)
    assert generation.lengths == tuple(expected.tolist())
