"""When the tests of pages are left out: where there is no browser, and never without a word."""

from types import SimpleNamespace

import pytest

from tests.inference import browser, conftest

PAGES = SimpleNamespace(get_closest_marker=lambda name: name == "pages")
OTHERS = SimpleNamespace(get_closest_marker=lambda name: None)


@pytest.fixture
def bare(monkeypatch):
    """A machine without any; gives what is asked anew."""
    monkeypatch.delenv("CHROME_BIN", raising=False)
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    monkeypatch.setattr(browser, "find_spec", lambda name: True)
    monkeypatch.setattr(browser, "chromium", lambda: pytest.fail("there is nothing to be opened"))
    monkeypatch.setattr(conftest, "missing", browser.missing.__wrapped__)


def fails(error):
    raise error


@pytest.mark.parametrize("what", ["Playwright", "Chromium"])
def test_what_is_missing_is_said(bare, monkeypatch, what):
    if what == "Playwright":
        monkeypatch.setattr(browser, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(browser, "chromium", lambda: fails(browser.NoChromium("there is no Chromium")))
    with pytest.raises(pytest.skip.Exception, match=f"was not tried in a browser: .*{what}"):
        conftest.pytest_runtest_setup(PAGES)
    conftest.pytest_runtest_setup(OTHERS)


def test_a_browser_that_is_named_is_never_left_out(bare, monkeypatch, tmp_path):
    """Be it there or not: what CHROME_BIN names is started, and fails if it cannot be."""
    monkeypatch.setenv("CHROME_BIN", str(tmp_path / "nothing"))
    conftest.pytest_runtest_setup(PAGES)
    monkeypatch.delenv("CHROME_BIN")
    monkeypatch.setattr(browser.shutil, "which", lambda name: "/usr/bin/chromium")
    conftest.pytest_runtest_setup(PAGES)


def test_one_that_is_there_and_does_not_start_fails(bare, monkeypatch):
    monkeypatch.setattr(browser, "chromium", lambda: fails(OSError("it crashed")))
    with pytest.raises(OSError, match="it crashed"):
        conftest.pytest_runtest_setup(PAGES)
