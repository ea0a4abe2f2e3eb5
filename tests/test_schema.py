"""Content that does not fit a schema is told by its field."""

import pytest

from landmark_cli.schema import check
from tests.schemas import GOOD, Schema

WRONG = {
    "missing": ({"name": ...}, "lacks name"),
    "null": ({"name": None}, "name should be text"),
    "true is no number": ({"maybe": True}, "maybe should be a whole number"),
    "a float": ({"maybe": 1.0}, "maybe should be a whole number"),
    "too large": ({"maybe": 2**70}, "maybe should be a whole number"),
    "text": ({"number": "1"}, "number should be a number"),
    "a choice": ({"kind": "c"}, "kind should be 'a' or 'b'"),
    "a choice of another type": ({"kind": ["a"]}, "kind should be 'a' or 'b', found \\['a'\\]"),
    "inside": ({"inner": {"x": {"shape": [1, "2"]}}}, r"inner\.x\.shape\[1\] should be a whole number, found '2'"),
    "an object": ({"inner": [1]}, "inner should be an object, found \\[1\\]"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_fields_of_another_type_are_named(change, message):
    content = {key: value for key, value in (GOOD | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        check(Schema, content)


def test_fields_of_a_later_version_are_left_out():
    assert check(Schema, GOOD | {"later": 1}) == check(Schema, GOOD)
