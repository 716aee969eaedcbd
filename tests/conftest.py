"""What a property is, and the table of those that a run has proved, at its end.

A property is a statement, its source, an error that must vanish, and defects under which it does not. The table is
printed here and not beside the properties, because the process that prints it collects no tests when others run them.
"""

import os
import sys

import pytest
import torch

CAUGHT_FACTOR = 1000
"""A defect is caught where it makes the error this many tolerances."""


@pytest.fixture
def prove(record_property, monkeypatch):
    """Checks a property, and that each mutant breaks it; both are told to the table at the end of the run."""

    def check(statement, source, error, *mutants, tolerance=1e-10, caught_factor=CAUGHT_FACTOR):
        found, caught = error(), []
        for mutant in mutants:
            with monkeypatch.context() as patch:
                mutant.apply(patch)
                caught.append((mutant.name, error()))
        record_property("property", [statement, source, found, tolerance, caught])
        assert found <= tolerance, f"{statement} ({source}): off by {found:.3g}, tolerance {tolerance:g}"
        assert mutants, "a property names a defect that breaks it"
        for name, broken in caught:
            assert not broken <= caught_factor * tolerance, f"{statement}: does not notice {name!r} ({broken:.3g})"

    return check


def pytest_terminal_summary(terminalreporter):
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            if getattr(report, "when", None) == "call":
                rows += [value for name, value in report.user_properties if name == "property"]
    if not rows:
        return
    terminalreporter.section(f"{len(rows)} properties")
    for statement, source, error, tolerance, caught in sorted(rows, key=lambda row: (row[1], row[0])):
        terminalreporter.write_line(f"{statement}  [{source}]")
        mutants = ", ".join(f"{name} ({broken:.1e})" for name, broken in caught)
        terminalreporter.write_line(f"    error {error:.1e} <= {tolerance:.0e}; caught: {mutants}")


@pytest.fixture(autouse=True)
def environment():
    """As it was, after each test: a Trainer that launches ranks writes theirs into it, and one rank stays in its group.

    The next world of ranks would take itself for a part of that one, and wait.
    """
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized() and "vllm" not in sys.modules:  # in whose engines it may be at work
        torch.distributed.destroy_process_group()
    changed = {name for name in before | os.environ if before.get(name) != os.environ.get(name)}
    for name in changed - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
