"""`grpo-lightning chat <folder>`: ask a policy questions and read its completions."""

import sys
from collections.abc import Iterator

import torch
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerBase

from grpo_lightning.policy import Policy, PretrainedPolicy
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.inprocess import InProcessEngine
from grpo_lightning.types import ConfigurationError, Coordinates, GenerationRequest, SamplingParams, Stream

DEFAULT_MAX_NEW_TOKENS = 256


def main(args: list[str]) -> None:
    """Run the command with the given arguments, without its name."""
    parser = ArgumentParser(prog="grpo-lightning chat", exit_on_error=False)
    parser.add_function_arguments(chat, as_positional=True)
    chat(**parser.parse_args(args).as_dict())


def chat(
    folder: str, prompt: str | None = None, temperature: float = 0.7, max_new_tokens: int | None = None, seed: int = 0
) -> None:
    """Complete one prompt, or each line of the standard input, and print the completions.

    Every prompt starts afresh. It goes through the tokenizer's chat template where there is one, otherwise it is
    completed as it stands. The same seed and prompts give the same completions.

    Args:
        folder: A policy's folder, as a run exports it, or a hub id.
        prompt: The only prompt; null reads prompts from the standard input until it ends.
        temperature: Of the sampling, >= 0; 0 takes the likeliest token.
        max_new_tokens: Longest completion in tokens, >= 1; null for 256, or as many as the policy has positions for.
        seed: Of the sampling.

    Raises:
        ConfigurationError: A setting is out of its range, or no policy could be loaded from `folder`.
    """
    if temperature < 0:
        raise ConfigurationError(f"--temperature must be >= 0, got {temperature}.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigurationError(f"--max_new_tokens must be >= 1, got {max_new_tokens}.")
    engine, policy = _load(folder)
    for turn, text in enumerate(_prompts() if prompt is None else [prompt]):
        if not text.strip():
            continue
        request = GenerationRequest(slot=0, token_ids=_tokens(text, policy.tokenizer), num_completions=1)
        length = _length(max_new_tokens, len(request.token_ids), policy)
        sampling = SamplingParams(temperature=temperature, max_new_tokens=length)
        coordinates = Coordinates(seed=seed, stream=Stream.PREDICT, iteration=turn)
        print(engine.generate([request], sampling, coordinates)[0].text, flush=True)


def _length(max_new_tokens: int | None, num_prompt_tokens: int, policy: Policy) -> int:
    """The longest completion that is wanted and has room."""
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    room = DEFAULT_MAX_NEW_TOKENS if positions is None else positions - num_prompt_tokens
    if positions is not None and room < (max_new_tokens or 1):
        raise ConfigurationError(
            f"--max_new_tokens: after a prompt of {num_prompt_tokens} tokens the policy has room for {max(room, 0)} of "
            f"its {positions}, got {max_new_tokens or 'none'}."
        )
    return min(DEFAULT_MAX_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens


def _load(folder: str) -> tuple[RolloutEngine, Policy]:
    source = PretrainedPolicy(folder)
    tokenizer = source.load_tokenizer()
    policy = Policy(source.load_model(seed=0), tokenizer)
    policy.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    engine = InProcessEngine()
    engine.setup(policy.model, tokenizer, policy.eos_token_ids)
    return engine, policy


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if tokenizer.chat_template:
        conversation = [{"role": "user", "content": text}]
        return tuple(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False))
    return tuple(tokenizer(text)["input_ids"])


def _prompts() -> Iterator[str]:
    """Lines of the standard input; a person at a terminal sees a prompt sign."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
