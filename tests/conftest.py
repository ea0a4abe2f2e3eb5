"""What all tests share."""

import gc
import importlib.util
import os
import signal

import pytest
import torch
from hypothesis import settings

# Without a GPU kernels run in Triton's interpreter, which is chosen when triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from tests.interpreter import quicken

        quicken()

# A shell's work in the background ignores the interrupts that tests send to themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Continuous integration runs on slow and busy machines: an example's time says nothing.
settings.register_profile("landmark", deadline=None)
settings.load_profile("landmark")


def pytest_collection_finish():
    """What has been imported stays. The garbage collector, which accelerate calls at the end of every run, would look
    through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps its state for the whole process; a test with this starts and ends without one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def forwards_of(monkeypatch):
    """Gives, for a module that launches kernels, a list with an entry for each time that they go forward."""

    def count(launches):
        found, forward = [], launches.forward
        monkeypatch.setattr(launches, "forward", lambda *given: found.append(given) or forward(*given))
        return found

    return count
