import pytest
from transformers import LlamaConfig, LlamaForCausalLM


def llama(layers=3, **sizes):
    """A small decoder with fewer key heads than heads."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**settings, **sizes}))


@pytest.fixture
def make_llama():
    return llama
