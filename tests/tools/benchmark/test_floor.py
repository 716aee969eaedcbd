from dataclasses import replace

import pytest

from tools.benchmark.floor import step_flops
from tools.benchmark.workloads import WORKLOADS, ModelShape, Workload

TINY = Workload(
    name="tiny",
    model=ModelShape(vocabulary=5, hidden=2, intermediate=3, layers=1, heads=1),
    num_prompts=1,
    prompt_tokens=2,
    group_size=2,
    max_new_tokens=3,
)


def test_a_step_counted_by_hand():
    # A layer has 4 * 2 * 2 + 3 * 2 * 3 = 34 weights: 68 operations per token. A query over c keys: 4 * 2 * c = 8c.
    # A prediction: 2 * 2 * 5 = 20.
    # Prefill: two tokens, over 1 and 2 keys, and one prediction:              2 * 68 + 8 * 3 + 20 = 180.
    # Completions of 1 and 3 tokens: of the second, the first two are fed, over 3 and 4 keys, and predict the others:
    #                                                                          2 * 68 + 8 * 7 + 40 = 232.
    flops = step_flops(TINY, [1, 3])
    assert (flops.prefill, flops.decode) == (180, 232)
    # One forward of the reference is both, 412; the policy's forward and backward are three, 1236.
    assert (flops.reference, flops.update) == (412, 1236)
    assert flops.total == 180 + 232 + 412 + 1236


def test_a_layer_more_costs_its_matrices_and_attention_again():
    two = replace(TINY, model=replace(TINY.model, layers=2))
    # Without the 20 of each prediction: 160 and 192.
    assert step_flops(two, [1, 3]).prefill == 2 * 160 + 20
    assert step_flops(two, [1, 3]).decode == 2 * 192 + 40


def test_without_a_penalty_no_reference_is_asked():
    assert step_flops(replace(TINY, kl_coefficient=0.0), [1, 3]).reference == 0


def test_completions_of_one_prompt_share_it():
    one, many = (step_flops(replace(TINY, group_size=size), [3] * size) for size in (1, 16))
    assert many.prefill == one.prefill
    assert many.decode == 16 * one.decode


@pytest.mark.parametrize(
    ("name", "num_weights"),
    # 64 * 256 + 4 * (4 * 256^2 + 3 * 256 * 688); 151,936 * 256 + 2 * ...; 32,000 * 512 + 8 * (4 * 512^2 + ...)
    [("W1", 3_178_496), ("W4", 40_476_672), ("W5", 41_582_592)],
)
def test_the_models_are_of_the_sizes_that_are_stated(name, num_weights):
    model = WORKLOADS[name].model
    assert model.vocabulary * model.hidden + model.layers * model.layer_weights == num_weights
