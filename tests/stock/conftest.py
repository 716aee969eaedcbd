import pytest
import rich
import torch
from stock import matrix


class Claim:
    """What a test says of its part."""

    def __init__(self, part, record, is_written):
        self._part, self._record, self._is_written = part, record, is_written
        self.is_told = False

    def works(self, seen):
        self._tell(matrix.Row(*self._part, "works", seen))

    def refused(self, message):
        """With the message, as it is."""
        self._tell(matrix.Row(*self._part, "refused", "“" + " ".join(str(message).split()) + "”"))

    def _tell(self, row):
        self.is_told = True
        self._record("row", list(row))
        if not self._is_written:
            assert row.line in matrix.PAGE.read_text(), "docs/lightning.md differs: python -m tools.lightning_page"


@pytest.fixture
def claim(request, record_property):
    """Tells the page what was seen, or compares it with what the page says."""
    is_written = request.config.pluginmanager.has_plugin(matrix.WRITER)
    made = Claim(request.function.part, record_property, is_written)
    yield made
    failed = request.session.testsfailed
    assert made.is_told or failed, "a test of a part says what it saw"


@pytest.fixture(autouse=True)
def switches():
    """As they were: flags of the Trainer, and its rich bar, switch them for the whole process."""
    yield
    rich.reconfigure()
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.backends.cudnn.benchmark = False
    torch.set_default_dtype(torch.float32)
