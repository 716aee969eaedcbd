import pytest
from objective_cases import ragged_minibatch


@pytest.fixture
def minibatch():
    return ragged_minibatch()
