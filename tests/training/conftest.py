import pytest


@pytest.fixture(autouse=True)
def every_test_without_a_state(fresh_accelerator):
    """What is trained here begins as in a new process."""
