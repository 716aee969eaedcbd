from dataclasses import replace

from tools.benchmark.measure import actual_tokens
from tools.benchmark.rate import HEAD_ROWS, matmul_rate, products
from tools.benchmark.workloads import WORKLOADS, ModelShape, Workload

TINY = Workload(
    name="tiny",
    model=ModelShape(vocabulary=5, hidden=2, intermediate=3, layers=2, heads=1),
    num_prompts=2,
    prompt_tokens=4,
    group_size=3,
    max_new_tokens=6,
)


def test_the_products_are_those_of_the_layers_and_the_head():
    assert products(TINY, 100) == [(8, (100, 2, 2)), (4, (100, 2, 3)), (2, (100, 3, 2)), (1, (100, 2, 5))]


def test_the_head_is_measured_in_parts():
    assert products(TINY, 3 * HEAD_ROWS)[-1] == (3, (HEAD_ROWS, 2, 5))


def test_an_update_has_each_prompt_once_and_no_last_token():
    assert actual_tokens(TINY) == 2 * 4 + 6 * 5


def test_the_rate_is_of_operations_per_second():
    assert 1e3 < matmul_rate(TINY, 8) < 1e15


def test_a_reduced_workload_is_smaller():
    for workload in WORKLOADS.values():
        reduced = workload.reduced()
        assert actual_tokens(reduced) * 5 < actual_tokens(workload)
        assert replace(reduced, name="") != replace(workload, name="")
