"""What a property is: a statement, its source, an error that must vanish, and defects under which it does not."""

import pytest

CAUGHT_FACTOR = 1000
"""A defect is caught where it makes the error this many tolerances."""


@pytest.fixture
def prove(record_property, monkeypatch):
    """Checks a property, and that each mutant breaks it; both are told to the table at the end of the run."""

    def check(statement, source, error, *mutants, tolerance=1e-10):
        found, caught = error(), []
        for mutant in mutants:
            with monkeypatch.context() as patch:
                mutant.apply(patch)
                caught.append((mutant.name, error()))
        record_property("property", [statement, source, found, tolerance, caught])
        assert found <= tolerance, f"{statement} ({source}): off by {found:.3g}, tolerance {tolerance:g}"
        assert mutants, "a property names a defect that breaks it"
        for name, broken in caught:
            assert not broken <= CAUGHT_FACTOR * tolerance, f"{statement}: does not notice {name!r} ({broken:.3g})"

    return check
