"""Fields of requests: served, without effect, refused by name where they ask for something, or unknown."""

import re
from pathlib import Path

import pytest
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.chat.chat_completion_user_message_param import ChatCompletionUserMessageParam
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from landmark_cli.serving.protocol import (
    UNSERVED,
    WITHOUT_EFFECT,
    ChatAsked,
    CompletionAsked,
    Message,
    Part,
    Refused,
    StreamOptions,
)

KINDS = [CompletionAsked, ChatAsked, Message, StreamOptions]
USER = {"role": "user", "content": "a"}
FURTHER = [(kind, name) for kind in KINDS for name in sorted(kind.further)]
each_field = pytest.mark.parametrize(("kind", "name"), FURTHER, ids=lambda each: getattr(each, "__name__", each))


def request(kind: type[Part], **fields) -> Part:
    """A request, or what is a part of one with these fields."""
    if kind is CompletionAsked:
        return CompletionAsked(**{"model": "m", "prompt": "a", **fields})
    if kind is Message:
        return ChatAsked(model="m", messages=[USER, {**USER, **fields}])
    if kind is StreamOptions:
        return ChatAsked(model="m", messages=[USER], stream_options=fields)
    return ChatAsked(**{"model": "m", "messages": [USER], **fields})


PLACES = {Message: "messages.1.", StreamOptions: "stream_options."}


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (CompletionAsked, CompletionParams),
        (ChatAsked, ChatParams),
        (Message, ChatCompletionAssistantMessageParam),
        (Message, ChatCompletionUserMessageParam),
        (StreamOptions, ChatCompletionStreamOptionsParam),
    ],
)
def test_every_field_of_openais_own_client_is_of_one_kind(kind, theirs):
    for name in theirs.__annotations__:
        assert (name in kind.model_fields) + (name in kind.further) == 1, name
    assert kind.further <= UNSERVED.keys() | WITHOUT_EFFECT and not UNSERVED.keys() & WITHOUT_EFFECT


@each_field
def test_what_changes_no_answer_is_taken_and_what_would_is_refused_by_its_name(kind, name):
    request(kind, **{name: None}).check()
    asked = request(kind, **{name: {"something": 1}})
    if name in WITHOUT_EFFECT:
        asked.check()
        return
    for nothing in UNSERVED[name]:
        request(kind, **{name: nothing}).check()
    with pytest.raises(Refused, match=f"^{re.escape(PLACES.get(kind, '') + name)} is not served") as refused:
        asked.check()
    assert (refused.value.status, refused.value.param) == (400, PLACES.get(kind, "") + name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_there_is_not_is_an_error_of_openais_form(kind):
    # "echo" is known, but not there.
    for name in ("min_p", "echo") if kind is not CompletionAsked else ("min_p", "tools"):
        called = PLACES.get(kind, "") + name
        with pytest.raises(Refused, match=f"^Unknown parameter: '{re.escape(called)}'.$") as refused:
            request(kind, **{name: 1}).check()
        assert refused.value.body()["error"] | {"message": ""} == {
            "message": "",
            "type": "invalid_request_error",
            "param": called,
            "code": "unknown_parameter",
        }


def test_values_that_are_nearly_nothing():
    for fields in ({"logprobs": 0}, {"best_of": 3}, {"best_of": 3, "n": 2}):
        with pytest.raises(Refused, match="is not served"):
            request(CompletionAsked, **fields).check()
    request(CompletionAsked, best_of=3, n=3).check()
    with pytest.raises(Refused, match=r"messages\.0\.content\.0\.cache"):
        request(ChatAsked, messages=[{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}]).check()


def test_the_page_names_every_field():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    served = {name for kind in KINDS for name in kind.model_fields}
    assert served | UNSERVED.keys() | WITHOUT_EFFECT <= named
