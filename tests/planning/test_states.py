"""Weights, gradients, optimizer states and reference: against real tensors, and by hand."""

import pytest
import torch

from grpo_lightning.planning.budget import weights_of
from grpo_lightning.planning.settings import Settings, optimizer_states
from grpo_lightning.planning.states import BUCKET, OptimizerStates, Sharding, Size, Weights, states_of

ADAM = OptimizerStates(per_element=2, per_tensor=4)
SMALL = Weights(trained=(Size(100, 4), Size(10, 4)), block=40, around=30)


def of(name, weights=SMALL, ranks=4, reference=True, optimizer=ADAM, **settings):
    sharding = Sharding(name=name, ranks=ranks, **settings)
    return states_of(weights, sharding, optimizer, has_reference=reference)


def optimizer_of(tmp_path, **settings):
    (tmp_path / "run.yaml").write_text(f"model: {{init_args: {{optimizer: {settings}}}}}")
    return optimizer_states(Settings([str(tmp_path / "run.yaml")]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "optimizer",
    [
        {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
        {"class_path": "torch.optim.AdamW", "init_args": {"amsgrad": True}},
        {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
        {"class_path": "torch.optim.SGD"},
    ],
    ids=["adamw", "amsgrad", "momentum", "sgd"],
)
def test_the_states_of_one_process_are_the_bytes_of_its_tensors(make_llama, tmp_path, dtype, optimizer):
    model = make_llama().to(dtype)
    reference = make_llama().to(dtype).requires_grad_(False)
    settings = optimizer.get("init_args", {})
    owner = getattr(torch.optim, optimizer["class_path"].rsplit(".", 1)[-1])
    stepped = owner(model.parameters(), **settings)
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    stepped.step()
    kept = optimizer_of(tmp_path, **optimizer)
    found = of("single", weights_of(model), optimizer=kept)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    held = [v for state in stepped.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert found.optimizer == sum(v.nbytes for v in held)
    assert found.reference == sum(p.nbytes for p in reference.parameters())


def test_frozen_weights_have_no_gradient(make_llama):
    model = make_llama()
    model.model.embed_tokens.requires_grad_(False)
    found = of("single", weights_of(model), reference=False)
    assert found.weights - found.gradients == 97 * 64 * 4
    assert found.reference == 0


def test_tied_weights_count_once(make_llama):
    tied, untied = (weights_of(make_llama(tie_word_embeddings=tie)) for tie in (True, False))
    assert sum(s.numel for s in untied.trained) - sum(s.numel for s in tied.trained) == 97 * 64


def test_blocks_and_what_is_around_them_are_the_whole(make_llama):
    found = weights_of(make_llama(layers=3))
    assert found.around + 3 * found.block == sum(size.numel for size in found.trained)
    assert found.around == 2 * 97 * 64 + 64  # embedding, head, last norm


def test_ddp_has_buckets_as_large_as_the_gradients():
    # 110 elements of 4 bytes; the optimizer has two numbers for each, and 4 bytes for each of two tensors
    found = of("ddp")
    assert (found.weights, found.gradients, found.buckets, found.reference) == (440, 440, 440, 440)
    assert found.optimizer == 888


def test_fsdp2_cuts_everything():
    # shards of 25 and 3 (10 / 4, rounded up) elements
    found = of("fsdp2", compute_itemsize=2)
    assert (found.weights, found.gradients, found.reference) == (112, 112, 112)
    assert found.optimizer == 232
    assert found.gathered_in_rollout == 220
    # around the blocks twice (weights and gradients), two blocks and one's gradients: 2 (60 + 120)
    assert found.gathered_in_update == 360


@pytest.mark.parametrize(
    ("stage", "weights", "gradients"),
    # 110 elements of 2 bytes, and 28 fp32 elements of the gradients that are stepped
    [(1, 220, 220 + 112), (2, 220, 56 + 112), (3, 56, 56 + 112)],
)
def test_zero_steps_masters_in_shards(stage, weights, gradients):
    found = of(f"deepspeed_{stage}", compute_itemsize=2)
    assert (found.weights, found.gradients, found.reference) == (weights, gradients, weights)
    assert found.optimizer == 3 * 112 + 4
    assert found.buckets == 2 * 2 * BUCKET
    assert found.gathered_in_rollout == (220 if stage == 3 else 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_bytes_and_loses_none(stage):
    here, off = (of(f"deepspeed_{stage}", compute_itemsize=2, offload=offload) for offload in (False, True))
    parts = ("weights", "gradients", "optimizer", "reference", "on_cpu")
    assert sum(getattr(here, part) for part in parts) == sum(getattr(off, part) for part in parts)
    assert off.optimizer == 0
    assert (off.weights == 0) == (stage == 3)


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_3"])
def test_a_rollout_layer_by_layer_has_one_block_and_the_buffer_that_it_comes_in(name):
    found = of(name, compute_itemsize=2, is_layerwise=True)
    assert found.gathered_in_rollout == 2 * (30 + 2 * 40)
    whole = of(name, compute_itemsize=2)
    assert (found.weights, found.gathered_in_update) == (whole.weights, whole.gathered_in_update)


def test_one_rank_of_fsdp2_holds_what_a_single_process_holds():
    one, single = of("fsdp2", ranks=1), of("single")
    assert (one.weights, one.gradients, one.optimizer) == (single.weights, single.gradients, single.optimizer)
