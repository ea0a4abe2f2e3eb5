"""Chat templates that come from anywhere: text, or one line that says why not, in time and in bounded memory."""

import contextlib
import os
import time

import psutil
import pytest

from landmark_cli.errors import LandmarkError
from landmark_cli.inference import chat
from landmark_cli.inference.chat import ChatTemplate
from tests.models.families import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Größe {{ 1 + 1 }} 東京"}]
GOOD = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)
BAD = {
    "no template": ("{% for", "Unexpected|unexpected"),
    "a name that is none": ("{{ nothing.at.all }}", "undefined"),
    "of its own accord": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "no end": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
    "a power": ("{{ 9 ** (9 ** 9) }}", "more than 1 s|memory"),
    "padding": ("{{ '%999999999999d' % 1 }}", "memory|too big|too large|Python"),
    "a string without end": ("{{ 'x' * 99999999999 }}", "memory"),
    "text without end": ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "memory|more than 1 s"),
    "nested too deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "."),
    "a way out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "half a character": ("{{ '\\ud800' }}", "."),
}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


BEFORE: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def before():
    """Other tests may have left processes that new ones are forked from."""
    BEFORE.clear()
    BEFORE.update(psutil.Process().children())


def left_behind():
    """The processes that a test started and that are still there."""
    return set(psutil.Process().children()) - BEFORE


def test_a_template_gives_what_transformers_gives(tokenizer):
    tokenizer.chat_template = GOOD
    with contextlib.closing(ChatTemplate(tokenizer)) as template:
        for prompt in (True, False):
            expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
            assert template.render(MESSAGES, add_generation_prompt=prompt) == expected
        started = time.monotonic()
        for _ in range(200):
            template.render(MESSAGES)
        assert time.monotonic() - started < 5
    assert not left_behind()


@pytest.mark.parametrize(("source", "why"), BAD.values(), ids=BAD)
def test_a_bad_template_is_one_line_in_time(tokenizer, monkeypatch, source, why):
    monkeypatch.setattr(chat, "SECONDS", 1)
    monkeypatch.setattr(chat, "MEMORY", 300 << 20)
    tokenizer.chat_template = source
    with contextlib.closing(ChatTemplate(tokenizer)) as template:
        # It is the template that is to be ended in time: how long an interpreter takes to start is no part of that.
        template._start()
        started = time.monotonic()
        with pytest.raises(LandmarkError, match=why) as error:
            template.render(MESSAGES)
        assert time.monotonic() - started < 5
    assert "\n" not in str(error.value) and "chat template" in str(error.value)
    assert not left_behind()


def test_after_a_chat_that_fails_the_same_process_renders_others(tokenizer):
    tokenizer.chat_template = "{% if messages[1:] %}{{ raise_exception('one only') }}{% endif %}" + GOOD
    with contextlib.closing(ChatTemplate(tokenizer)) as template:
        said = template.render(MESSAGES)
        first = template._child.pid
        with pytest.raises(LandmarkError, match="one only"):
            template.render(MESSAGES * 2)
        assert template.render(MESSAGES) == said and template._child.pid == first


def test_after_a_chat_that_has_no_end_another_process_renders_others(tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    tokenizer.chat_template = "{% if messages[1:] %}" + BAD["no end"][0] + "{% endif %}" + GOOD
    with contextlib.closing(ChatTemplate(tokenizer)) as template:
        said = template.render(MESSAGES)
        with pytest.raises(LandmarkError, match="more than 1 s"):
            template.render(MESSAGES * 2)
        assert not left_behind()
        assert template.render(MESSAGES) == said


def test_a_child_that_somebody_else_ended_is_followed_by_another(tokenizer):
    tokenizer.chat_template = GOOD
    with contextlib.closing(ChatTemplate(tokenizer)) as template:
        said = template.render(MESSAGES)
        template._child.kill()
        assert template.render(MESSAGES) == said


def test_the_process_has_nothing_of_this_ones_but_its_tokenizer(tokenizer):
    """Not its threads, memory, open files or signals: what a fork of a process with threads shares can crash it."""
    tokenizer.chat_template = GOOD
    with open(__file__), contextlib.closing(ChatTemplate(tokenizer)) as template:
        template.render(MESSAGES)
        child, here = psutil.Process(template._child.pid), psutil.Process()
        assert child.exe() == here.exe() and child.cmdline() != here.cmdline()
        assert not child.open_files() and os.getsid(child.pid) == child.pid


class Elsewhere:
    """What another process cannot open."""

    def __reduce__(self):
        return (_only_here, (os.getpid(),))


def _only_here(process):
    if os.getpid() != process:
        raise ValueError("only where it was made")
    return Elsewhere()


def test_what_keeps_the_process_from_starting_is_told(tokenizer, monkeypatch):
    tokenizer.chat_template = GOOD
    tokenizer.more = Elsewhere()
    with pytest.raises(LandmarkError, match="cannot open the tokenizer: only where it was made"):
        ChatTemplate(tokenizer).render(MESSAGES)
    tokenizer.more = lambda: None
    with pytest.raises(LandmarkError, match="cannot be handed to another process"):
        ChatTemplate(tokenizer).render(MESSAGES)
    tokenizer.more = None
    monkeypatch.setattr(chat, "CHILD", chat.CHILD.with_name("missing.py"))
    with pytest.raises(LandmarkError, match="its process ended at once"):
        ChatTemplate(tokenizer).render(MESSAGES)
    monkeypatch.setattr(chat.sys, "executable", "/missing/python")
    with pytest.raises(LandmarkError, match="no process could be started for it .No such file"):
        ChatTemplate(tokenizer).render(MESSAGES)
    assert not left_behind()
