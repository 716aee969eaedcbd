"""Who may import whom. The imports are read, not run, so that a forbidden one is found wherever it hides."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STAGES = {"rewards", "rollout", "data", "groups", "batching", "objective", "policy", "optim", "strategies"}
PURE = {"functional", "types"}
MODULE_PARTS = {
    *STAGES,
    *PURE,
    *(
        "checkpointing",
        "controllers",
        "ending",
        "evaluation",
        "held_out",
        "metrics",
        "models",
        "phases",
        "preconditions",
        "preparation",
        "ranks",
        "resumed",
        "resuming",
        "rollouts",
    ),
    *("admission", "epochs", "run_folder", "stock_callbacks", "ticks"),
}

MAY_IMPORT = {
    # Nothing of ours; the dictionary speaks of mathematical objects.
    "functional": set(),
    "types": {"functional"},
    "version": set(),
    # The stages know the mathematics and the dictionary, not each other.
    **dict.fromkeys(STAGES, PURE),
    "strategies": {"checkpointing", *PURE},
    # What the module is put together from.
    "controllers": {"groups", *PURE},
    "ending": PURE,
    "admission": {
        *("data", "epochs", "evaluation", "models", "policy", "preconditions", "rewards", "rollouts"),
        *("stock_callbacks", "strategies", *PURE),
    },
    "epochs": {"batching", "ticks", *PURE},
    "evaluation": {"rewards", "rollout", *PURE},
    "held_out": {"ending", "evaluation", "rewards", "rollout", *PURE},
    "metrics": PURE,
    "models": {
        *(
            "batching",
            "checkpointing",
            "held_out",
            "policy",
            "ranks",
            "resumed",
            "stock_callbacks",
            "strategies",
            *PURE,
        ),
    },
    "resumed": {"checkpointing"},
    "phases": PURE,
    "preconditions": {"batching", "groups", "objective", "rollout", "ticks", *PURE},
    "preparation": {"batching", "objective", "policy", *PURE},
    "ranks": set(),
    "ticks": PURE,
    "checkpointing": PURE,
    "appending_csv": set(),
    "resuming": {"batching", "rollout", *PURE},
    "rollouts": {"batching", "data", "models", "rollout", "stock_callbacks", "strategies", *PURE},
    "run_folder": PURE,
    "stock_callbacks": PURE,
    "module": MODULE_PARTS,
    "supervised": MODULE_PARTS,
    # Extensions know the contracts, never the module.
    "accounting": set(),
    "callbacks": {"accounting", "controllers", "rewards", "data", "policy", "evaluation", "run_folder", *PURE},
    # The command line.
    "chat": {"policy", "rollout", *PURE},
    "merging": {"checkpointing", "policy", *PURE},
    "planning": {"batching", "constructors", "policy", "preconditions", "rollout", "strategies", *PURE},
    "cold_start": {"checkpointing", *PURE},
    "constructors": set(),
    "parse_errors": {"constructors", "strategies", *PURE},
    "trainer_errors": {"constructors", "strategies", *PURE},
    "cli": {
        *("admission", "callbacks", "chat", "checkpointing", "cold_start", "merging", "parse_errors"),
        *("planning", "preconditions", "resumed", "rollout", "run_folder", "strategies", "trainer_errors", *PURE),
    },
    "__init__": {"module", "supervised", "version", *PURE},
    "__main__": {"cli"},
}
"""Part of the package -> the other parts it may import. A part is a folder or a file of `grpo_lightning`."""

FILES = sorted([*ROOT.glob("grpo_lightning/**/*.py"), *ROOT.glob("callbacks/**/*.py")])


def part_of(file: Path) -> str:
    inside = file.relative_to(ROOT).with_suffix("").parts
    return inside[1] if inside[0] == "grpo_lightning" else inside[0]


def imports(tree: ast.AST, *, types_only: bool = False) -> Iterator[str]:
    """The modules that are imported, with the names taken from them; those for type checkers alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def parts_imported(source: str) -> set[str]:
    """The parts of the package that a source imports."""
    names = [name.split(".") for name in imports(ast.parse(source)) if name.split(".")[0] == "grpo_lightning"]
    return {name[1] if len(name) > 1 and name[1] in MAY_IMPORT else "__init__" for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_its_part_may(file):
    part = part_of(file)
    allowed = MAY_IMPORT[part] | {part} | ({"__init__"} if part in ("cli", "__main__") else set())
    assert parts_imported(file.read_text()) <= allowed


@pytest.mark.parametrize("file", sorted(ROOT.glob("grpo_lightning/functional/*.py")), ids=lambda file: file.name)
def test_functional_imports_torch_alone(file):
    roots = {name.split(".")[0] for name in imports(ast.parse(file.read_text()))}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "jaxtyping", "grpo_lightning"}


def test_every_part_has_a_rule():
    assert {part_of(file) for file in FILES} <= set(MAY_IMPORT)


def test_the_reader_sees_every_form_of_import():
    source = """
import grpo_lightning.types
from grpo_lightning import chat, policy
from grpo_lightning.rewards.callback import RewardCallback
if TYPE_CHECKING:
    from grpo_lightning.module import GRPOModule
def late():
    from grpo_lightning.data import Arithmetic
"""
    assert parts_imported(source) == {"types", "chat", "policy", "rewards", "data"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_name_says_the_idea(file):
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not vague & set(file.relative_to(ROOT).with_suffix("").parts)


def test_the_callbacks_folder_refuses_to_be_a_second_package():
    result = subprocess.run(
        [sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "grpo_lightning.callbacks" in result.stderr
