import copy
import logging

import pytest
from tokenizers.processors import TemplateProcessing

from grpo_lightning.data.encoding import PlacedRow, PromptEncoder
from grpo_lightning.types import ConfigurationError


def encoder(**settings):
    defaults = {"prompt_column": "prompt", "system_prompt": None, "prompt_template": None, "use_chat_template": False}
    return PromptEncoder(**{**defaults, **settings})


def encode(row, tokenizer, **settings):
    (prompt,) = encoder(**settings).encode([row], tokenizer)
    return prompt, tokenizer.decode(prompt.token_ids)


def refuse(rows, tokenizer, **settings):
    with pytest.raises(ConfigurationError) as error:
        encoder(**settings).encode(rows, tokenizer)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_a_text_is_taken_as_it_stands(tokenizer):
    prompt, written = encode({"prompt": "2+2=", "answer": "4", "level": 1}, tokenizer)
    assert written == prompt.text == "2+2="
    assert prompt.messages is None
    assert prompt.columns == {"answer": "4", "level": 1}
    assert prompt.index == 0


def test_rows_keep_their_numbers_and_their_order(tokenizer):
    prompts = encoder().encode([{"prompt": "a"}, {"prompt": "b"}], tokenizer)
    assert [(p.index, p.text) for p in prompts] == [(0, "a"), (1, "b")]


def test_no_rows_are_no_prompts(tokenizer):
    assert encoder().encode([], tokenizer) == []


def test_a_template_goes_around_the_prompt_and_keeps_other_braces(tokenizer):
    template = "Answer in \\boxed{}. {prompt} {x}"
    prompt, written = encode({"prompt": "2+2="}, tokenizer, prompt_template=template)
    assert written == prompt.text == "Answer in \\boxed{}. 2+2= {x}"


def test_a_chat_template_writes_a_text_as_a_user_message(chat_tokenizer):
    prompt, written = encode({"prompt": "2+2?"}, chat_tokenizer, use_chat_template=True)
    assert written == "[user]2+2?\n[assistant]"
    assert prompt.text == "2+2?"
    assert prompt.messages == ({"role": "user", "content": "2+2?"},)


def test_a_system_prompt_makes_a_text_a_conversation(chat_tokenizer):
    prompt, written = encode({"prompt": "2+2?"}, chat_tokenizer, system_prompt="Think.", prompt_template="Q: {prompt}")
    assert written == "[system]Think.\n[user]Q: 2+2?\n[assistant]"
    assert prompt.text == "Q: 2+2?"


CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
]


def test_a_conversation_goes_through_the_chat_template(chat_tokenizer):
    prompt, written = encode({"prompt": CONVERSATION}, chat_tokenizer, system_prompt="Think.")
    assert written == "[system]Think.\n[user]Hi\n[assistant]Hello\n[user]2+2?\n[assistant]"
    assert prompt.text == "2+2?"
    assert len(prompt.messages) == 4


def test_a_template_goes_around_the_last_message_of_a_conversation(chat_tokenizer):
    _, written = encode({"prompt": CONVERSATION}, chat_tokenizer, prompt_template="<{prompt}>")
    assert written == "[user]Hi\n[assistant]Hello\n[user]<2+2?>\n[assistant]"
    assert CONVERSATION[2]["content"] == "2+2?"


def test_special_tokens_are_the_tokenizers_for_a_text_and_the_chat_templates_for_a_conversation(chat_tokenizer):
    begins = copy.deepcopy(chat_tokenizer)
    begin = begins.eos_token_id
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begins.eos_token} $A", special_tokens=[(begins.eos_token, begin)]
    )
    text, _ = encode({"prompt": "2+2?"}, begins)
    assert text.token_ids[0] == begin
    conversation, _ = encode({"prompt": "2+2?"}, begins, use_chat_template=True)
    assert begin not in conversation.token_ids


def test_a_conversation_needs_a_chat_template(tokenizer):
    message = refuse([{"prompt": CONVERSATION}], tokenizer)
    assert "no chat template" in message
    assert "data.use_chat_template" in message


def test_a_conversation_that_the_chat_template_refuses_is_named(chat_tokenizer):
    row = PlacedRow({"prompt": [{"role": "tool", "content": "4"}]}, place="chat.jsonl:9")
    message = refuse([{"prompt": CONVERSATION}, row], chat_tokenizer)
    assert "chat.jsonl:9" in message
    assert "no tools here" in message


def test_two_system_messages_are_a_mistake(chat_tokenizer):
    row = {"prompt": [{"role": "system", "content": "Think."}, *CONVERSATION]}
    message = refuse([row], chat_tokenizer, system_prompt="Think.")
    assert "row 0" in message
    assert "data.system_prompt" in message


def test_a_row_without_a_prompt_is_named(tokenizer):
    row = PlacedRow({"question": "2+2=", "answer": "4"}, place="train.jsonl:17")
    message = refuse([{"prompt": "1+1="}, row], tokenizer)
    assert message == "train.jsonl:17 has no column 'prompt' (data.prompt_column); it has: question, answer."


@pytest.mark.parametrize("prompt", [None, 4, [], [4], [{"role": "user"}], {"role": "user", "content": "2+2?"}])
def test_a_prompt_that_is_neither_text_nor_messages_is_named(tokenizer, prompt):
    message = refuse([{"prompt": "1+1="}, {"prompt": prompt}], tokenizer)
    assert "row 1" in message
    assert "data.prompt_column" in message


def test_texts_among_conversations_are_a_mistake(chat_tokenizer):
    message = refuse([{"prompt": CONVERSATION}, {"prompt": "2+2="}], chat_tokenizer)
    assert "the prompt of row 1 is a text, that of row 0 is a list of messages" in message
    assert "data.use_chat_template" in message


def test_texts_among_conversations_become_conversations(chat_tokenizer):
    prompts = encoder(use_chat_template=True).encode([{"prompt": CONVERSATION}, {"prompt": "2+2?"}], chat_tokenizer)
    assert chat_tokenizer.decode(prompts[1].token_ids) == "[user]2+2?\n[assistant]"


def test_an_empty_prompt_is_a_mistake(tokenizer):
    assert "row 1 has an empty prompt" in refuse([{"prompt": "1+1="}, {"prompt": ""}], tokenizer)


def test_a_template_without_a_place_for_the_prompt_is_a_mistake():
    with pytest.raises(ConfigurationError, match=r"data.prompt_template must have '\{prompt\}'"):
        encoder(prompt_template="Q: {question}")


def test_unknown_characters_are_counted_and_said(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        encoder().encode([{"prompt": "2+2="}, {"prompt": "2€"}, {"prompt": "3€"}], tokenizer)
    assert "2 of 3 prompts have characters that the tokenizer does not know; the first is row 1." in caplog.text


def test_a_prompt_of_unknown_characters_alone_is_refused_with_its_row(tokenizer):
    rows = [PlacedRow({"prompt": text}, place=f"train.jsonl:{n}") for n, text in enumerate(["2+2=", "€€"], start=1)]
    with pytest.raises(ConfigurationError, match=r"prompt of train\.jsonl:2.*model\.policy\.characters"):
        encoder().encode(rows, tokenizer)


def test_a_prompt_knows_where_its_row_stands(tokenizer):
    placed, plain = encoder().encode(
        [PlacedRow({"prompt": "2+2="}, place="train.jsonl:17"), {"prompt": "1+1="}], tokenizer
    )
    assert (placed.place, plain.place) == ("train.jsonl:17", None)
