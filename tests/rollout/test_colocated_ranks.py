"""An engine of vLLM on each rank, or one that ranks share: the completions of one process."""

from functools import partial
from importlib.util import find_spec

import pytest
import replay
import torch

from grpo_lightning.rollout import VLLMEngine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

ENGINE = partial(VLLMEngine, kv_cache_gib=0.1, enforce_eager=True, max_num_seqs=8)
SETTINGS = {"num_epochs": 2, "head_dim": 32, "lr": 1e-3}
ZERO_3 = {"stage": 3, "zero_settings": {"stage3_param_persistence_threshold": 0}}


def by_slot(slots, tokens):
    size = len(tokens) // len(slots)
    return {slot: tokens[i * size : (i + 1) * size] for i, slot in enumerate(slots)}


@pytest.fixture(scope="module")
def one():
    """The last rollout of one process and its weights."""
    record, module = replay.run(iterations=5, engine=ENGINE, **SETTINGS)
    tokens = [completion.token_ids for completion in module.rollout.completions]
    return by_slot(module.rollout.slots, tokens), record.weights[-1]


@pytest.mark.parametrize("sharded", [{"strategy": "ddp"}, {"strategy": "fsdp2"}, {"zero": ZERO_3}], ids=str)
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_ranks_with_VLLM_draw_what_one_process_draws(one, tmp_path, sharded, tensor_parallel_size):
    engine = partial(ENGINE, tensor_parallel_size=tensor_parallel_size)
    # Every sync compares each tensor that an engine holds with the policy's, bit by bit.
    (of_ranks,) = replay.in_world(tmp_path, [{**SETTINGS, "engine": engine, **sharded}], ranks=2)
    completions, weights = one
    drawn = [by_slot(rank["slots"], rank["tokens"]) for rank in of_ranks]
    assert all(drawn)
    assert drawn[0] | drawn[1] == completions
    for rank in of_ranks:
        torch.testing.assert_close(rank["weights"][-1], weights, atol=1e-5, rtol=0)  # sums in another order
