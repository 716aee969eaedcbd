import pytest

from grpo_lightning.policy import CharacterPolicy

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """A token per printable character, without a chat template."""
    return CharacterPolicy(PRINTABLE).load_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The same with a chat template."""
    tokenizer = CharacterPolicy(PRINTABLE).load_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer
