"""Content that is kept with a checksum of itself: what was damaged or changed by hand is told from what was written."""

from __future__ import annotations

from typing import Any

CHECKSUM = "checksum"


def sealed_content(content: dict[str, Any]) -> dict[str, Any]:
    """An object that JSON can hold, with its checksum."""
    return content | {CHECKSUM: _checksum(content)}


def unsealed_content(content: dict[str, Any]) -> dict[str, Any]:
    """What `sealed_content` was given. Raises KeyError or ValueError where it is not that any more."""
    found = {key: value for key, value in content.items() if key != CHECKSUM}
    if content[CHECKSUM] != _checksum(found):
        raise ValueError("its content is not what was written to it")
    return found


def _checksum(content: dict[str, Any]) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
