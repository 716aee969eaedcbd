"""Talking to an exported policy."""

import io

import pytest

from grpo_lightning.chat import chat, main
from grpo_lightning.policy import CharacterPolicy, Policy
from grpo_lightning.types import ConfigurationError

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("policy"))


def export(folder, chat_template=None):
    source = CharacterPolicy(hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    policy = Policy(source.load_model(seed=0), source.load_tokenizer())
    policy.tokenizer.chat_template = chat_template
    policy.save(folder)
    return str(folder)


def said(capsys):
    return capsys.readouterr().out


def test_one_prompt_is_completed(folder, capsys):
    main([folder, "--prompt", "3+4=", "--max_new_tokens", "5"])
    assert 0 < len(said(capsys).removesuffix("\n")) <= 5


def test_a_completion_is_as_long_as_the_policy_has_positions(folder, capsys):
    main(
        [folder, "--prompt", "3+4=", "--seed", "1"]
    )  # room for 60 of its 64, less than the 256 tokens of larger policies
    assert 0 < len(said(capsys).removesuffix("\n")) <= 60


@pytest.mark.parametrize(("prompt", "length", "room"), [("3+4=", 61, 60), ("1" * 64, None, 0), ("1" * 70, None, 0)])
def test_a_completion_without_room_is_refused(folder, prompt, length, room):
    with pytest.raises(ConfigurationError, match=f"--max_new_tokens: .* has room for {room} of its 64"):
        chat(folder, prompt=prompt, max_new_tokens=length)


def test_lines_of_the_standard_input_are_completed_until_it_ends(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("3+4=\n\n5+1=\n"))
    chat(folder, max_new_tokens=3, temperature=0.0)
    from_lines = said(capsys)
    for prompt in ("3+4=", "5+1="):
        chat(folder, prompt=prompt, max_new_tokens=3, temperature=0.0)
    assert from_lines == said(capsys)


def test_the_seed_decides_what_is_said(folder, capsys):
    def answer(seed):
        chat(folder, prompt="3+4=", temperature=1.5, max_new_tokens=20, seed=seed)
        return said(capsys)

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_a_chat_template_is_applied(folder, tmp_path, capsys):
    templated = export(tmp_path / "templated", CHAT_TEMPLATE)
    chat(templated, prompt="3+4", temperature=0.0, max_new_tokens=8)
    through_template = said(capsys)
    chat(folder, prompt="<3+4>=", temperature=0.0, max_new_tokens=8)
    assert through_template == said(capsys)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": -1.0}, "--temperature must be >= 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be >= 1"),
        ({"max_new_tokens": 1000}, "room for 60 of its 64"),
    ],
)
def test_settings_out_of_range_are_refused(folder, settings, expected):
    with pytest.raises(ConfigurationError, match=expected):
        chat(folder, prompt="3+4=", **settings)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        chat(str(tmp_path), prompt="3+4=")
