import json

import pytest
import torch

from grpo_lightning.policy import PretrainedPolicy
from grpo_lightning.types import ConfigurationError


@pytest.fixture
def folder(policy, tmp_path, monkeypatch):
    """A saved policy in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    policy.save(tmp_path / "policy")
    return tmp_path / "policy"


def refuse(path, load="load_tokenizer"):
    source = PretrainedPolicy(str(path))
    with pytest.raises(ConfigurationError) as error:
        getattr(source, load)(**({"seed": 0} if load == "load_model" else {}))
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def rewrite(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("path", ["policy", "./policy", "{}", "~/policy"])
def test_a_folder_is_loaded_as_it_was_saved(folder, policy, monkeypatch, path):
    monkeypatch.setenv("HOME", str(folder.parent))
    source = PretrainedPolicy(path.format(folder))
    model, tokenizer = source.load_model(seed=3), source.load_tokenizer()
    assert all(map(torch.equal, model.state_dict().values(), policy.model.state_dict().values()))
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64), ("auto", torch.bfloat16)],
)
def test_weights_are_in_the_precision_that_was_asked_for(folder, policy, dtype, expected):
    policy.model.bfloat16().save_pretrained(folder)
    model = PretrainedPolicy(str(folder), dtype=dtype).load_model(seed=0)
    assert {p.dtype for p in model.parameters()} == {expected}


def test_the_attention_is_the_one_that_was_asked_for(folder):
    model = PretrainedPolicy(str(folder), attn_implementation="eager").load_model(seed=0)
    assert model.config._attn_implementation == "eager"


def test_code_of_a_repository_is_not_run_unless_it_is_trusted(folder):
    rewrite(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        model_type="x",
    )
    (folder / "evil.py").write_text("raise SystemExit('the code was run')")
    message = refuse(folder, "load_model")
    assert "model.policy.path" in message


@pytest.mark.parametrize("path", ["./absent", "absent", "/absent/policy", "~/absent", "a/b/c"])
@pytest.mark.parametrize("load", ["load_tokenizer", "load_model"])
def test_a_missing_folder_is_named_and_not_looked_for_in_a_hub(folder, path, load):
    assert refuse(path, load) == f"model.policy.path: the model folder {path!r} does not exist."


def test_a_folder_that_is_no_model_is_named(folder):
    (folder / "config.json").unlink()
    assert refuse(folder) == f"model.policy.path: the model folder {str(folder)!r} has no config.json."


def test_a_hub_id_that_cannot_be_had_is_named(folder):
    assert "model.policy.path: no tokenizer could be loaded from 'no-such-owner/model'" in refuse("no-such-owner/model")


def test_a_folder_without_a_tokenizer_is_named(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert f"model.policy.path: no tokenizer could be loaded from {str(folder)!r}" in refuse(folder)


def test_a_tokenizer_without_an_end_of_sequence_is_named(folder):
    rewrite(folder / "tokenizer_config.json", eos_token=None)
    assert refuse(folder) == f"model.policy.path: the tokenizer of {str(folder)!r} has no end-of-sequence token."


def test_a_folder_without_weights_is_named(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert f"model.policy.path: no causal language model could be loaded from {str(folder)!r}" in refuse(
        folder, "load_model"
    )


def test_nothing_is_loaded_before_it_is_asked_for():
    PretrainedPolicy("./absent")


@pytest.mark.parametrize("num_bytes", [0, 100, 5000])
def test_weights_that_break_off_are_refused(folder, num_bytes):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    assert "model.policy.path: no causal language model" in refuse(folder, "load_model")


def test_the_reason_for_a_missing_tokenizer_is_said_to_its_end(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refuse(folder)
    assert "model.policy.path" in message
    assert not message.rstrip().endswith(":")
