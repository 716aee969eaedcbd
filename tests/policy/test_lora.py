"""Adapters: additions to a frozen model, in the form of PEFT on disk, and one model with it where they are merged."""

import copy
import json
import warnings

import peft
import pytest
import torch
from adapters import adapted
from test_layouts import FAMILIES, ROWS
from torch import nn
from transformers import AutoModelForCausalLM

from grpo_lightning.batching import SharedPrefix
from grpo_lightning.merging import main as merge_command
from grpo_lightning.policy import LoRA, NamedWeights, Policy, PretrainedPolicy, Unadapted, adapter_weights
from grpo_lightning.policy.adaptation import merge
from grpo_lightning.types import ConfigurationError

# PEFT 0.21 asks transformers 5.23 under a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[3, 5, 4, 9, 8]])
BATCH = SharedPrefix().lay_out(ROWS, torch.device("cpu"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(params=["llama", "qwen3", "gemma2", "gpt2"])
def model(request):
    """A plain head, a tied one, a capped one, and layers that hold the transpose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[request.param]().eval()


@pytest.fixture
def llama():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES["llama"]().eval()


@pytest.fixture
def base_folder(llama, source, tmp_path):
    """The model on disk."""
    Policy(copy.deepcopy(llama), source.load_tokenizer()).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(base_folder, source):
    """A policy on that model whose adapter has learned, and its folder."""
    model, checksum = adapted(PretrainedPolicy(str(base_folder)).load_model(seed=0))
    policy = Policy(model, source.load_tokenizer(), base_checksum=checksum)
    policy.save(base_folder.parent / "adapter")
    return policy, base_folder.parent / "adapter"


class TestNewAdapter:
    def test_changes_nothing_but_what_is_trained(self, model):
        before, kind = logits(model), type(model)
        LoRA(rank=3).adapt(model, seed=0)
        assert type(model) is kind
        assert torch.equal(logits(model), before)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_weights(model))

    def test_is_on_every_linear_layer_but_the_head(self, llama):
        LoRA(rank=3).adapt(llama, seed=0)
        # Queries and output 16 x 32, keys and values 16 x 16, three matrices of 16 x 16; in two layers.
        expected = 2 * 3 * (2 * (16 + 32) + 2 * (16 + 16) + 3 * (16 + 16))
        assert sum(weight.numel() for weight in adapter_weights(llama).values()) == expected

    def test_is_a_function_of_the_seed_alone(self, llama):
        state = torch.get_rng_state()
        models = [copy.deepcopy(llama) for _ in range(3)]
        for model, seed in zip(models, (0, 0, 1), strict=True):
            LoRA(rank=3).adapt(model, seed=seed)
        first, same, other = (torch.cat([w.flatten() for w in adapter_weights(model).values()]) for model in models)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)

    def test_adds_what_the_paper_says(self, llama):
        """W x + (alpha / r) B A x, with alpha twice the rank where none is given."""
        adapted(llama, rank=2)
        layer, x = llama.model.layers[0].self_attn.q_proj, torch.arange(16.0)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(layer(x), layer.base_layer.weight @ x + 2 * (b @ (a @ x)))

    def test_has_single_precision_on_a_model_of_half(self, llama):
        model, _ = adapted(llama.bfloat16())
        assert {weight.dtype for weight in adapter_weights(model).values()} == {torch.float32}
        assert logits(model).dtype == torch.bfloat16
        assert {tensor.dtype for _, tensor in NamedWeights(model)} == {torch.bfloat16}

    def test_on_the_head_is_scored_as_on_any_layer(self, llama, source):
        model, _ = adapted(llama.double(), targets=["lm_head", "v_proj"])
        policy, plain = Policy(model, source.load_tokenizer()), copy.deepcopy(model)
        merge(plain)
        expected = Policy(plain, source.load_tokenizer())(BATCH, 0.7).logprobs_BT
        torch.testing.assert_close(policy(BATCH, 0.7).logprobs_BT, expected, rtol=0, atol=1e-12)


class TestMergedWeights:
    def test_are_those_that_peft_merges_under_the_plain_models_names(self, model):
        names = [name for name, _ in model.named_parameters()]
        adapted(model.double())
        weights = dict(NamedWeights(model))
        assert list(weights) == names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = peft.LoraModel(model, model.peft_config["default"], "again").merge_and_unload(
                adapter_names=["default"]
            )
        for name, weight in merged.named_parameters():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-14)

    def test_make_a_plain_model_of_the_same_logits(self, model):
        kind, names = type(model), [name for name, _ in model.named_parameters()]
        adapted(model.double())
        before = logits(model)
        merge(model)
        # Gemma 2 computes norms and attention in single precision.
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 if "Gemma2" in kind.__name__ else 1e-13)
        assert [name for name, _ in model.named_parameters()] == names
        assert not any(hasattr(module, "lora_A") for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_are_as_the_adapter_is_when_they_are_read(self, llama):
        weights = NamedWeights(adapted(llama)[0])
        before = dict(weights)
        with torch.no_grad():
            llama.model.layers[1].mlp.up_proj.lora_B["default"].weight.add_(1)
        changed = {name for name, weight in weights if not torch.equal(weight, before[name])}
        assert changed == {"model.layers.1.mlp.up_proj.weight"}


class TestReference:
    def test_is_the_model_without_its_adapter(self, model, source):
        before = Policy(copy.deepcopy(model), source.load_tokenizer())(BATCH, 1.0)
        policy = Policy(adapted(model)[0], source.load_tokenizer())
        with torch.no_grad():
            scores, of_policy = Unadapted(policy)(BATCH, 1.0), policy(BATCH, 1.0)
        assert torch.equal(scores.logprobs_BT, before.logprobs_BT)
        assert not torch.allclose(of_policy.logprobs_BT, before.logprobs_BT, atol=1e-2)

    def test_leaves_the_policy_as_it_is_even_where_it_fails(self, llama, source):
        policy = Policy(adapted(llama)[0], source.load_tokenizer())
        before, is_trained = policy(BATCH, 1.0).logprobs_BT, [p.requires_grad for p in policy.parameters()]
        with pytest.raises(AttributeError):
            Unadapted(policy)(None, 1.0)
        assert torch.equal(policy(BATCH, 1.0).logprobs_BT, before)
        assert [p.requires_grad for p in policy.parameters()] == is_trained


class TestFolder:
    def test_is_one_that_peft_loads(self, trained, base_folder):
        policy, folder = trained
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).eval()
        assert torch.equal(logits(loaded), logits(policy.model.eval()))

    def test_holds_the_adapter_alone(self, trained, base_folder):
        policy, folder = trained
        weights = peft.load_peft_weights(folder)
        assert sum(w.numel() for w in weights.values()) == sum(
            p.numel() for p in policy.parameters() if p.requires_grad
        )
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)

    def test_is_gone_on_from(self, trained, base_folder):
        policy, folder = trained
        model = PretrainedPolicy(str(base_folder)).load_model(seed=0)
        LoRA(from_adapter=str(folder), rank=3).adapt(model, seed=5)
        assert torch.equal(logits(model.eval()), logits(policy.model.eval()))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_weights(model))

    def test_of_peft_itself_is_gone_on_from_without_its_dropout(self, llama, tmp_path):
        config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.5, use_rslora=True, target_modules="all-linear")
        theirs = peft.get_peft_model(copy.deepcopy(llama), config)
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                if "lora_B" in name:
                    weight.normal_(generator=torch.Generator().manual_seed(0))
        theirs.save_pretrained(tmp_path)
        LoRA(from_adapter=str(tmp_path)).adapt(llama, seed=0)
        assert torch.equal(logits(llama.train()), logits(theirs.eval()))
        assert not any(isinstance(module, nn.Dropout) and module.p for module in llama.modules())

    def test_is_a_policy_with_the_adapter_merged(self, trained):
        policy, folder = trained
        model = PretrainedPolicy(str(folder)).load_model(seed=0)
        torch.testing.assert_close(logits(model.eval()), logits(policy.model.eval()), rtol=0, atol=1e-5)
        assert dict(model.named_parameters()).keys() == dict(NamedWeights(policy.model)).keys()

    def test_is_merged_into_a_folder_that_transformers_alone_loads(self, trained, tmp_path, capsys):
        policy, folder = trained
        merge_command([str(folder), str(tmp_path / "merged")])
        assert str(tmp_path / "merged") in capsys.readouterr().out
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(model.eval()), logits(policy.model.eval()), rtol=0, atol=1e-5)

    def test_of_a_merged_one_adds_to_it(self, trained, source, tmp_path):
        """An adapter on an adapter: the second one's base is the first one's folder."""
        model, checksum = adapted(PretrainedPolicy(str(trained[1])).load_model(seed=0), rank=1)
        Policy(model, source.load_tokenizer(), base_checksum=checksum).save(tmp_path / "second")
        again = PretrainedPolicy(str(tmp_path / "second")).load_model(seed=0)
        torch.testing.assert_close(logits(again.eval()), logits(model.eval()), rtol=0, atol=1e-5)


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, r"model\.lora\.rank must be >= 1, got 0"),
            ({"alpha": 0.0}, r"model\.lora\.alpha must be > 0, got 0"),
            ({"targets": []}, r"model\.lora\.targets must name a layer"),
            (
                {"from_adapter": "./absent"},
                r"model\.lora\.from_adapter: 'absent' is no folder with",
            ),
        ],
    )
    def test_settings_out_of_range_are_refused_at_once(self, settings, message):
        with pytest.raises(ConfigurationError, match=message):
            LoRA(**settings)

    def test_peft_is_asked_for_at_once(self, monkeypatch):
        monkeypatch.setattr("grpo_lightning.policy.lora.find_spec", lambda name: None)
        with pytest.raises(ConfigurationError, match=r"model\.lora needs PEFT.*grpo_lightning\[lora\]"):
            LoRA()

    @pytest.mark.parametrize(
        ("family", "targets"), [("llama", ["q"]), ("llama", ["q_proj", "embed_tokens"]), ("qwen3", ["lm_head"])]
    )
    def test_targets_that_are_no_linear_layers_with_weights_of_their_own(self, family, targets):
        with pytest.raises(ConfigurationError, match=rf"model\.lora\.targets: '{targets[-1]}' is no .* has .*q_proj"):
            LoRA(targets=targets).adapt(FAMILIES[family](), seed=0)

    @pytest.mark.parametrize("settings", [{"rank": 4}, {"alpha": 1.0}, {"targets": ["q_proj"]}], ids=str)
    def test_settings_that_an_adapter_does_not_have(self, trained, settings):
        (name,) = settings
        with pytest.raises(ConfigurationError, match=rf"model\.lora\.{name} is .* in the adapter .*, got"):
            LoRA(from_adapter=str(trained[1]), **settings)

    def test_an_adapter_of_other_weights(self, trained):
        with pytest.raises(ConfigurationError, match=r"model\.lora\.from_adapter: .* on another model, .*base"):
            LoRA(from_adapter=str(trained[1])).adapt(FAMILIES["llama"](), seed=0)

    def test_an_adapter_of_other_shapes(self, trained):
        _, folder = trained
        (folder / "base_checksum.json").unlink()  # as PEFT writes it
        for family, of_other in (("gemma", r"k_proj\.lora_B\.weight is"), ("gpt2", "Target modules")):
            config = FAMILIES[family]().config
            config.num_key_value_heads = 4
            other = type(FAMILIES[family]())(config)
            with pytest.raises(ConfigurationError, match=rf"model\.lora\.from_adapter: .* is of another.*{of_other}"):
                LoRA(from_adapter=str(folder)).adapt(other, seed=0)

    @pytest.mark.parametrize(
        ("config", "what"),
        [
            (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "has more than"),
            (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "has more than"),
            (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "not LoRA"),
        ],
        ids=["dora", "whole layers", "another method"],
    )
    def test_adapters_that_are_more_or_another_thing(self, llama, tmp_path, config, what):
        peft.get_peft_model(copy.deepcopy(llama), config).save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match=rf"model\.lora\.from_adapter: .* {what}"):
            LoRA(from_adapter=str(tmp_path)).adapt(llama, seed=0)

    def test_an_adapter_whose_model_has_no_folder(self, source, tmp_path):
        model, checksum = adapted(source.load_model(seed=0))
        Policy(model, source.load_tokenizer(), base_checksum=checksum).save(tmp_path)
        with pytest.raises(ConfigurationError, match=r"model\.policy\.path: .* does not say which model it is for"):
            PretrainedPolicy(str(tmp_path)).load_model(seed=0)

    def test_what_cannot_be_merged(self, trained, base_folder):
        with pytest.raises(ConfigurationError, match=r"merge: .* no folder with an adapter"):
            merge_command([str(base_folder), "new"])
        with pytest.raises(ConfigurationError, match=r"merge: .* is there already"):
            merge_command([str(trained[1]), str(base_folder)])
