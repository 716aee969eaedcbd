"""Tests against TRL, which has an environment of its own: `make test-peers`. Without TRL nothing here is collected."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if find_spec("trl") else ["test_*"]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.peers)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # TRL's are not ours to mend


@pytest.fixture(autouse=True)
def in_float64():
    """TRL makes its tensors in the default precision; in this one rounding hides nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model and tokenizer for the trainer to hold; the losses are of given log-probabilities."""
    from peers.trl_trainer import save_tiny_model

    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def trl(model_folder, tmp_path):
    """See `peers.trl_trainer.Peer`."""
    from peers.trl_trainer import Peer

    return Peer(model_folder, tmp_path)
