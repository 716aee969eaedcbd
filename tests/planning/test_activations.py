"""What a forward leaves behind: against the tensors that autograd saves, and by hand."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from grpo_lightning.batching import Packed, Padded, SharedPrefix
from grpo_lightning.batching.layout import Row
from grpo_lightning.planning.activations import Decoder, Precision, Tokens, activation_bytes, head_bytes, layer_bytes
from grpo_lightning.planning.budget import _Demand, decoder_of
from grpo_lightning.planning.settings import Settings
from grpo_lightning.policy import CharacterPolicy, Policy
from grpo_lightning.policy.loading import recompute_layers

MARGIN = 0.15
"""Left out are tensors of one number a token, masks and rotations, which weigh more in so narrow a model."""
PROMPT, NEW, PROMPTS, GROUP = 24, 40, 2, 4


class Saved:
    """The bytes of the storages that autograd keeps, without those of the weights."""

    def __init__(self, model):
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept = {}

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage._cdata not in self._weights:
            self._kept[storage._cdata] = storage  # held, so that its place is not used again
        return tensor

    def hooks(self):
        return saved_tensors_hooks(self.note, lambda tensor: tensor)

    @property
    def nbytes(self):
        return sum(storage.nbytes() for storage in self._kept.values())


def tokens_of(tmp_path, layout):
    (tmp_path / "run.yaml").write_text(
        f"model: {{sampling: {{max_new_tokens: {NEW}}}, group_size: {GROUP}, prompts_per_iteration: {PROMPTS}}}"
    )
    return _Demand(Settings([str(tmp_path / "run.yaml")]), 1, PROMPT).microbatch(layout)


def batch(layout):
    ids = torch.arange(PROMPT), torch.arange(NEW)
    return layout.lay_out([Row(s, *ids) for s in range(PROMPTS) for _ in range(GROUP)], torch.device("cpu"))


@pytest.fixture
def policy(make_llama):
    model = make_llama(layers=4)
    return Policy(model, CharacterPolicy().load_tokenizer())


@pytest.mark.parametrize("layout", [Padded(), Packed(), SharedPrefix()], ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_the_forward_keeps_what_the_formula_says(policy, tmp_path, layout, kind):
    precision = {"fp32": Precision(4), "bf16": Precision(2), "autocast": Precision(2, is_autocast=True)}[kind]
    if kind == "bf16":
        policy.to(torch.bfloat16)
    saved = Saved(policy)
    with saved.hooks(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        policy(batch(layout), 1.0)
    found = activation_bytes(decoder_of(policy.model, 4), precision, tokens_of(tmp_path, layout), checkpointing=False)
    casts = 2 * sum(p.numel() for p in policy.parameters() if p.dim() == 2) if kind == "autocast" else 0
    assert found == pytest.approx(saved.nbytes - casts, rel=MARGIN)


@pytest.mark.parametrize("layout", [Padded(), SharedPrefix()], ids=lambda layout: type(layout).__name__)
def test_with_checkpoints_one_layer_and_the_inputs_of_all_are_kept(policy, tmp_path, layout):
    """Outside of the layers by hooks; the layers' inputs as they are called; and one layer by itself."""
    layers, arguments, saved = policy.model.model.layers, {}, Saved(policy)

    def enter(layer, args, kwargs):
        saved.note(args[0])
        arguments[layer] = args, kwargs

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    recompute_layers(policy.model)
    with saved.hooks():
        policy(batch(layout), 1.0)
    for handle in handles:
        handle.remove()
    layers[0].gradient_checkpointing = False
    args, kwargs = arguments[layers[0]]
    with saved.hooks():
        layers[0](*args, **kwargs)
    found = activation_bytes(decoder_of(policy.model, 4), Precision(4), tokens_of(tmp_path, layout), checkpointing=True)
    assert found == pytest.approx(saved.nbytes, rel=MARGIN)


def test_the_tokens_are_those_that_are_laid_out(tmp_path):
    for layout in (Padded(), Packed(), SharedPrefix()):
        found, laid_out = tokens_of(tmp_path, layout), batch(layout)
        assert found.computed == laid_out.input_ids_RL.numel()
        assert found.predicting == len(laid_out.positions_N)


def test_one_layer_by_hand():
    decoder = Decoder(layers=1, hidden=10, queries=8, keys=4, feed_forward=20, vocabulary=5)
    # fp32: two norms of 2 x 10 numbers, 3 x 8 + 2 x 4 of the attention, 3 x 20 of the feed-forward: 132 numbers
    assert layer_bytes(decoder, Precision(4), Tokens(1, 1, 0)) == 4 * 132
    # bf16: all of them in bf16
    assert layer_bytes(decoder, Precision(2), Tokens(1, 1, 0)) == 2 * 132
    # autocast: 2 x 10 numbers in fp32, 5 copies of 10 and the rest in bf16
    assert layer_bytes(decoder, Precision(2, is_autocast=True), Tokens(1, 1, 0)) == 4 * 20 + 2 * (50 + 92)
    # three tokens whose keys and values are copied
    assert layer_bytes(decoder, Precision(4), Tokens(1, 1, 3)) == 4 * 132 + 3 * 4 * 8


def test_the_head_of_many_tokens_is_constant():
    decoder = Decoder(layers=1, hidden=10, queries=8, keys=4, feed_forward=20, vocabulary=2**17)
    assert head_bytes(decoder, Tokens(1, 64, 0)) == 4 * 64 * 2**17
    assert head_bytes(decoder, Tokens(1, 65, 0)) == head_bytes(decoder, Tokens(1, 10**6, 0)) == 2**24
