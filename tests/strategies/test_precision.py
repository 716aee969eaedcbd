"""What each precision makes of weights, gradients and moments, as docs/scaling.md has it; and what is refused."""

from importlib.util import find_spec

import loaded
import precisions
import pytest
import replay
import torch
from worlds import launch

from grpo_lightning.policy import Policy
from grpo_lightning.types import ConfigurationError

TINY = {"characters": replay.ALPHABET, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 64}
FP32, BF16 = ["float32"], ["bfloat16"]
SINGLE = {"weights": FP32, "computed": FP32, "gradients": FP32, "moments": FP32, "stepped": FP32}
HALF = {**SINGLE, "computed": BF16}

# trainer.strategy, trainer.precision, more settings, and what is seen. "stepped" is what the optimizer has.
ROWS = [
    ("ddp", "32-true", {}, SINGLE),
    ("ddp", "bf16-mixed", {}, HALF),
    ("fsdp2", "32-true", {}, SINGLE),
    ("fsdp2", "bf16-mixed", {}, HALF),
    ("fsdp2", "32-true", {"compute_dtype": "bfloat16"}, HALF),
    ("fsdp2", "32-true", {"dtype": "bfloat16", "lora": {"rank": 2}}, HALF),
    ("deepspeed_2", "32-true", {}, SINGLE),
    ("deepspeed_2", "bf16-mixed", {}, {**HALF, "weights": BF16, "gradients": BF16}),
    ("deepspeed_2", "32-true", {"dtype": "bfloat16"}, SINGLE),
    ("deepspeed_3", "32-true", {"dtype": "bfloat16"}, SINGLE),
    ("deepspeed_3", "32-true", {"dtype": "bfloat16", "lora": {"rank": 2}}, SINGLE),
    ("deepspeed_3", "bf16-mixed", {}, {**HALF, "weights": BF16, "gradients": BF16}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    source = loaded.CharacterPolicy(**TINY)
    Policy(source.load_model(seed=1), source.load_tokenizer()).save(folder / "model")
    return folder


def case(folder, strategy, precision, dtype="float32", **settings):
    source = {"path": str(folder / "model"), "dtype": dtype}
    return ("pretrained", source, {"strategy": strategy, "precision": precision, **settings})


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
def test_each_row_of_the_table_is_seen(folder):
    cases = [case(folder, strategy, precision, **more) for strategy, precision, more, _ in ROWS]
    launch(precisions.see, folder / "world", cases, num_ranks=2)
    for i, row in enumerate(ROWS):
        for rank in (0, 1):
            seen = torch.load(folder / f"world/seen.{i}.{rank}")
            assert seen == row[-1], row


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_precision_in_which_small_steps_are_lost_is_refused(precision):
    module, data, trainer, _ = replay.make(precision=precision)
    with pytest.raises(ConfigurationError, match=rf"trainer\.precision must not be {precision}.*compute_dtype"):
        trainer.fit(module, data)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision_are_not_trained_themselves(dtype):
    module, data, trainer, _ = replay.make(dtype=dtype)
    with pytest.raises(ConfigurationError, match=rf"model\.policy\.dtype must be float32 .*got {dtype}"):
        trainer.fit(module, data)


def test_additions_to_weights_in_half_precision_are_trained_in_single():
    _, module = replay.run(dtype="bfloat16", lora={"rank": 2}, iterations=1)
    dtypes = {(p.dtype, p.requires_grad) for p in module.policy.parameters()}
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}


@pytest.mark.filterwarnings("ignore:It is recommended to use")  # reduced by us
def test_weights_in_half_precision_can_be_evaluated():
    module, data, trainer, _ = replay.make(dtype="bfloat16", limit_val_batches=1.0, live=True)
    trainer.validate(module, data, verbose=False)
    assert module.policy is not None


def test_steps_of_a_usual_learning_rate_are_lost_in_half_precision():
    """The reason: of weights of usual size, few change where each should by 1e-6."""
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 0.02
    changed = (weights.bfloat16() - 1e-6 != weights.bfloat16()).float().mean()
    assert changed < 0.05
    assert (weights - 1e-6 != weights).all()
