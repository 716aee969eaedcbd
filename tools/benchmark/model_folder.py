"""The folder with random weights and a tokenizer that both frameworks load."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.benchmark.workloads import ModelShape, Workload

PAD, EOS, FIRST_WORD = 0, 1, 2


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words: number n of the vocabulary is ``w<n>``."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{n}": n for n in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_model_folder(model: ModelShape, folder: Path, *, max_positions: int) -> None:
    """Write config, weights and `word_tokenizer`.

    Args:
        model: Its shape.
        folder: Where to.
        max_positions: Longest sequence.
    """
    word_tokenizer(model.vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def prompt_texts(workload: Workload, *, num_prompts: int) -> list[str]:
    """Distinct prompts of exactly the workload's length."""
    words = torch.randint(
        FIRST_WORD,
        workload.model.vocabulary,
        (num_prompts, workload.prompt_tokens),
        generator=torch.Generator().manual_seed(1),
    )
    return [" ".join(f"w{n}" for n in row) for row in words.tolist()]


def reward_of(token_ids: list[int]) -> float:
    """Of no interest, but different within a group: whether the sum of the tokens is even."""
    return float(sum(token_ids) % 2 == 0)
