import pytest

from tools.benchmark import profile
from tools.benchmark.profile import REST, kind_of, shares


@pytest.mark.parametrize(("operation", "kind"), [
    ("aten::mm", "matrix products"),
    ("aten::addmm_", "matrix products"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
    ("aten::index_select", "copies and gathers"),
    ("aten::_fused_adamw_", "fused optimizer"),
    ("aten::mul", REST),
    ("aten::_softmax", REST),
])  # fmt: skip
def test_every_operation_has_a_kind(operation, kind):
    assert kind_of(operation) == kind


def test_shares_are_of_all_operations_and_the_largest_comes_first():
    found = shares([("aten::mm", 3.0), ("aten::bmm", 3.0), ("aten::mul", 1.0), ("aten::cat", 1.0)])
    assert next(iter(found.items())) == ("matrix products", 0.75)
    assert found[REST] == found["copies and gathers"] == 0.125
    assert sum(found.values()) == 1


def test_a_step_is_profiled(capsys):
    profile.main(["W1", "--threads", "1", "--reduced"])
    lines = capsys.readouterr().out.splitlines()[-6:]  # others print as well
    assert lines[0].startswith("W1, 32-true, 1 threads: ")
    assert sum(float(line.split("%")[0]) for line in lines[1:]) == pytest.approx(100, abs=0.3)  # five roundings
    assert any(line.endswith("matrix products") for line in lines)
