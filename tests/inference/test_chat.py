"""Chat templates that come from anywhere: text, or one line that says why not, in time and in bounded memory."""

import contextlib
import os
import signal
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
    assert not psutil.Process().children()


@pytest.mark.parametrize(("source", "why"), BAD.values(), ids=BAD)
def test_a_bad_template_is_one_line_in_time(tokenizer, monkeypatch, source, why):
    monkeypatch.setattr(chat, "SECONDS", 1)
    monkeypatch.setattr(chat, "MEMORY", 300 << 20)
    tokenizer.chat_template = source
    template, started = ChatTemplate(tokenizer), time.monotonic()
    with pytest.raises(LandmarkError, match=why) as error:
        template.render(MESSAGES)
    assert time.monotonic() - started < 5
    assert "\n" not in str(error.value) and "chat template" in str(error.value)
    assert not psutil.Process().children()


def test_after_a_bad_one_a_good_one_renders(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    template = ChatTemplate(tokenizer)
    with pytest.raises(LandmarkError, match="no"):
        template.render(MESSAGES)
    tokenizer.chat_template = GOOD
    assert template.render(MESSAGES).startswith("<user>")
    template.close()


def test_a_child_that_somebody_else_ended_is_followed_by_another(tokenizer):
    tokenizer.chat_template = GOOD
    with contextlib.closing(ChatTemplate(tokenizer)) as template:
        said = template.render(MESSAGES)
        os.kill(template._child, signal.SIGKILL)
        assert template.render(MESSAGES) == said
