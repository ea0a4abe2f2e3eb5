"""Which tests of this folder can be run where there is no browser."""

import pytest

from tests.inference.browser import missing


def pytest_runtest_setup(item):
    """All tests of pages are left out in one place, so that the summary says it in one line."""
    if item.get_closest_marker("pages") and missing():
        pytest.skip(f"the page of a trace was not tried in a browser: {missing()}")
