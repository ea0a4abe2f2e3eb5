"""What tests of kernels share."""

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN: nothing may be left unwritten, and nothing unwritten may be used."""
    assert deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    # Only warnings: on a GPU the definition's own operations need not be deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.empty(3, device=device).isnan().all() and torch.ones(2, device=device).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
