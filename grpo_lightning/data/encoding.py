"""From a row to a prompt: template, conversation, tokens."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo_lightning.types import ConfigurationError, Message, Prompt

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]
Content = str | tuple[Message, ...]
"""A prompt before its tokens: a text, or a conversation."""


class PlacedRow(dict[str, Any]):
    """A row that knows where it stands, for the messages of mistakes in it.

    Example: ``PlacedRow({"prompt": "2+2="}, place="train.jsonl:17")``
    """

    place: str

    def __init__(self, columns: Row, *, place: str) -> None:
        super().__init__(columns)
        self.place = place


def place_of(row: Row, index: int) -> str:
    """What a person calls the row: its file and line where known, else its number."""
    return getattr(row, "place", None) or f"row {index}"


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Turns rows into prompts.

    Args:
        prompt_column: The column that holds a text, or a list of messages.
        system_prompt: The first message of every conversation; None for none. Makes a text a conversation.
        prompt_template: A text with ``{prompt}`` in it, put around the prompt; None for the prompt alone.
        use_chat_template: Whether a text becomes a conversation of one user message.
    """

    prompt_column: str
    system_prompt: str | None
    prompt_template: str | None
    use_chat_template: bool

    def __post_init__(self) -> None:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ConfigurationError(
                f"data.prompt_template must have '{{prompt}}' where the prompt goes, got {self.prompt_template!r}."
            )

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """A prompt for each row, with the row's number as its index.

        Raises:
            ConfigurationError: A row has no prompt, or one that cannot be written in tokens.
        """
        contents = [self._content(row, place_of(row, i)) for i, row in enumerate(rows)]
        _require_one_form(contents, rows)
        token_ids = _tokens(contents, rows, tokenizer)
        empty = next((i for i, ids in enumerate(token_ids) if not ids), None)
        if empty is not None:
            raise ConfigurationError(f"data: {place_of(rows[empty], empty)} has an empty prompt.")
        _check_unknown_tokens(token_ids, rows, tokenizer)
        return [
            self._prompt(i, row, content, tuple(ids))
            for i, (row, content, ids) in enumerate(zip(rows, contents, token_ids, strict=True))
        ]

    def _prompt(self, index: int, row: Row, content: Content, token_ids: tuple[int, ...]) -> Prompt:
        columns = {name: value for name, value in row.items() if name != self.prompt_column}
        place = getattr(row, "place", None)
        if isinstance(content, str):
            return Prompt(index=index, token_ids=token_ids, text=content, columns=columns, place=place)
        text = next((m["content"] for m in reversed(content) if m["role"] == "user"), content[-1]["content"])
        return Prompt(index=index, token_ids=token_ids, text=text, messages=content, columns=columns, place=place)

    def _content(self, row: Row, place: str) -> Content:
        """The row's prompt with everything around it that the settings ask for."""
        if self.prompt_column not in row:
            raise ConfigurationError(
                f"{place} has no column {self.prompt_column!r} (data.prompt_column); it has: {', '.join(row)}."
            )
        content = row[self.prompt_column]
        if isinstance(content, str):
            is_conversation = self.use_chat_template or self.system_prompt is not None
            if not is_conversation:
                return self._templated(content)
            messages: tuple[Message, ...] = ({"role": "user", "content": content},)
        else:
            messages = _messages(content, self.prompt_column, place)
        return self._conversation(messages, place)

    def _conversation(self, messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
        *earlier, last = messages
        messages = (*earlier, {**last, "content": self._templated(last["content"])})
        if self.system_prompt is None:
            return messages
        if messages[0]["role"] == "system":
            raise ConfigurationError(f"{place} has a system message of its own: set data.system_prompt: null.")
        return ({"role": "system", "content": self.system_prompt}, *messages)

    def _templated(self, text: str) -> str:
        # No str.format: a template may hold other braces, as in \boxed{}.
        return text if self.prompt_template is None else self.prompt_template.replace("{prompt}", text)


def _messages(content: Any, column: str, place: str) -> tuple[Message, ...]:
    is_list = isinstance(content, list | tuple) and len(content) > 0
    if is_list and all(_is_message(message) for message in content):
        return tuple(content)
    raise ConfigurationError(
        f"{place}: the column {column!r} (data.prompt_column) must hold a text, or a list of messages with 'role' and "
        f"'content', got {str(content)[:80]!r}."
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _require_one_form(contents: Sequence[Content], rows: Sequence[Row]) -> None:
    """Refuse texts among conversations: the one is not written as the other."""
    for i, content in enumerate(contents):
        if isinstance(content, str) != isinstance(contents[0], str):
            forms = ("text", "list of messages") if isinstance(content, str) else ("list of messages", "text")
            raise ConfigurationError(
                f"data: the prompt of {place_of(rows[i], i)} is a {forms[0]}, that of {place_of(rows[0], 0)} is a "
                f"{forms[1]}.\nMake them the same, or set data.use_chat_template: true."
            )


def _tokens(
    contents: Sequence[Content], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> list[Sequence[int]]:
    if not contents:
        return []
    texts = [content for content in contents if isinstance(content, str)]
    if texts:
        return list(tokenizer(texts)["input_ids"])
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            "data: the prompts are conversations, but the tokenizer has no chat template. Use an instruct model,\n"
            "or plain prompts (data.use_chat_template: false, data.system_prompt: null)."
        )
    written = [_written(content, place_of(rows[i], i), tokenizer) for i, content in enumerate(contents)]
    # The template has written the special tokens already.
    return list(tokenizer(written, add_special_tokens=False)["input_ids"])


def _written(messages: Content, place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation as the chat template writes it, up to where the policy goes on."""
    try:
        conversation = [dict(message) for message in messages if not isinstance(message, str)]
        return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise ConfigurationError(
            f"{place}: the tokenizer's chat template does not take the conversation: {error}"
        ) from error


def _check_unknown_tokens(
    token_ids: Sequence[Sequence[int]], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a prompt of which the policy would see nothing; warn of one of which it does not see everything."""
    unknown = tokenizer.unk_token_id
    places = [i for i, ids in enumerate(token_ids) if unknown is not None and unknown in ids]
    special = set(tokenizer.all_special_ids)
    for i in places:
        if special.issuperset(token_ids[i]):
            raise ConfigurationError(
                f"data: the tokenizer knows no character of the prompt of {place_of(rows[i], i)}. Its vocabulary comes "
                "from model.policy (for a CharacterPolicy: model.policy.characters)."
            )
    if places:
        logger.warning(
            "data: %d of %d prompts have characters that the tokenizer does not know; the first is %s.",
            len(places),
            len(rows),
            place_of(rows[places[0]], places[0]),
        )
