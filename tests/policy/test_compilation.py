"""Which settings of torch.compile are refused, and that blocks are compiled in place."""

import pytest
import torch
from torch._inductor import config

from grpo_lightning.policy import CharacterPolicy, Compile, Policy
from grpo_lightning.types import ConfigurationError

# Of torch's tracer itself, which looks at all that a tensor has, and makes instances of autograd's functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "absent"}, r"model\.compile\.backend must be one of .*'inductor'.*got 'absent'"),
        ({"backend": "aot_eager", "mode": "max-autotune"}, r"model\.compile\.mode .* inductor, got 'max-autotune'"),
    ],
)
def test_what_torch_would_refuse_in_the_middle_of_a_run_is_refused_before(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Compile(**settings)


def test_inductor_without_a_compiler_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(config.cpp, "cxx", ("/no/compiler",))
    with pytest.raises(ConfigurationError, match=r"model\.compile\.backend: inductor needs a C\+\+ compiler .* g\+\+"):
        Compile().check(CPU)
    Compile(backend="aot_eager").check(CPU)


def test_a_compiled_block_gives_the_same_states_under_the_same_names(policy):
    torch._dynamo.reset()
    layers, names = policy.model.model.layers, list(policy.state_dict())
    input_ids = torch.tensor([[3, 4, 5, 6]])
    expected = policy.model(input_ids=input_ids, use_cache=False).logits
    Compile(backend="eager").compile(layers)
    torch._dynamo.utils.counters.clear()
    found = policy.model(input_ids=input_ids, use_cache=False).logits
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert list(policy.state_dict()) == names


def test_layers_that_are_alike_share_what_is_compiled():
    """With hooks of their own, as segmented attention has, each would be compiled for itself, up to a limit."""
    graphs = []
    for num_layers in (2, 6):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        many = CharacterPolicy("0123456789+=", hidden_size=16, num_layers=num_layers, num_heads=2, max_positions=32)
        policy = Policy(many.load_model(seed=0), many.load_tokenizer())
        Compile(backend="eager").compile(policy.model.model.layers)
        policy.model(input_ids=torch.tensor([[3, 4, 5, 6]]), use_cache=False)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
