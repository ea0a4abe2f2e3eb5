"""A trace as one page that asks nothing of the network: its text, its reads, its style and its script are in it.

The prompt and what was generated are data: they stand in a block of JSON, in which no tag can begin, and the script
makes text nodes of them. The content security policy lets this style and this script run, known by their hashes, and
nothing else; Trusted Types forbid the script to make markup out of text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from string import Template

from ..contents import GenerationTrace
from ..packed import packed_reads

# In this order they are one script.
SCRIPTS = ("data", "elements", "virtual_list", "choice_view", "blocks", "overview", "tokens", "heads", "search", "main")


def page_of(trace: GenerationTrace) -> bytes:
    """The page, in UTF-8."""
    style = _asset("style.css")
    script = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    content = vars(trace) | {"reads": packed_reads(trace.reads)}
    # Where no "<" stands, no tag and no comment begins.
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    page = Template(_asset("index.html")).substitute(
        policy=_policy(style, script), style=style, script=script, data=data
    )
    # What is no character, as in a model's path that is not UTF-8, stands as JSON writes it.
    return page.encode("utf-8", "backslashreplace")


def _policy(style: str, script: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
