"""Traces in files: what they hold, and that a page holds it as data and nothing else. No browser is needed."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import UsageError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.generation import generate
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.inference.text import texts_of_blocks
from landmark_cli.inference.trace import GenerationTrace, check_trace, trace_of, write_trace
from landmark_cli.inference.trace.packed import WHOLE, packed_reads
from landmark_cli.inference.trace.page import SCRIPTS, page_of
from tests.awkward_tokenizers import BEGIN, byte_ids, byte_tokenizer
from tests.inference.traces import made_trace
from tests.tiny import tiny_model

GPT2 = load_tokenizer("gpt2")
# What would be markup, a script's end, a template's place or no text at all where a page was put together carelessly.
AWKWARD = [
    "</script><script>alert(1)</script>",
    "<!-- <script> -->",
    "<img src=x onerror=alert(1)>",
    "</SCRIPT ><style>*{display:none}</style>",
    "&lt;b&gt; &amp;",
    "$data $script ${policy} $$",
    "`${alert(1)}` \\u003c \\",
    "line\r\nbreak\u2028and\u2029more",
    "\x00\x08\x1b\ufffe",
    "東京🙂 עברית",
    "\udcff",
    "",
]


class Parsed(HTMLParser):
    """What a page consists of: tags with their attributes, and the text in each style and script."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self._inside = [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else None
        if self._inside:
            self.texts.append((tag, dict(attributes).get("type"), ""))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            tag, kind, before = self.texts.pop()
            self.texts.append((tag, kind, before + data))

    def text(self, tag, kind=None):
        (found,) = (text for *where, text in self.texts if where == [tag, kind])
        return found


def trace_with(texts, **changed):
    """A small trace whose blocks, tokens and name are these texts."""
    reads = [[{"layer": 0, "head": 0, "block": at % len(texts), "share": 0.5}] for at in range(len(texts))]
    about = {"model": "".join(texts), "memory_tokens": 0, "prompt_tokens": 9, "landmark_freq": 4}
    return GenerationTrace(**{**about, "blocks": texts, "tokens": texts, "reads": reads, **changed})


def parsed(trace):
    return Parsed(page_of(trace).decode("utf-8"))


def content_of(trace):
    return json.loads(parsed(trace).text("script", "application/json"))


def unpacked(packed):
    """What `packed_reads` was given, with shares as they are packed."""
    counts, blocks, shares = (
        np.frombuffer(base64.b64decode(packed[name]["data"]), f"<{packed[name]['type']}").tolist()
        for name in ("counts", "blocks", "shares")
    )
    layers, heads = packed["layers"], packed["heads"]
    slots, at = [], 0
    for count in counts:
        slots.append(list(zip(blocks[at : at + count], shares[at : at + count], strict=True)))
        at += count
    assert at == len(blocks) == len(shares)
    cells = len(layers) * heads
    return [
        [
            {"layer": layers[cell // heads], "head": cell % heads, "block": block, "share": share / WHOLE}
            for cell in range(cells)
            for block, share in slots[token + cell]
        ]
        for token in range(0, len(slots), max(1, cells))
    ]


# --- the page


def test_nothing_runs_but_the_page_s_own_style_and_script_known_by_their_hashes():
    page = parsed(made_trace(3000))
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    directives = dict(directive.split(" ", 1) for directive in policy.split("; "))

    def hashed(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert directives == {
        "default-src": "'none'",
        "script-src": hashed(page.text("script")),
        "style-src": hashed(page.text("style")),
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    attributes = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in attributes if name.startswith("on")} | attributes & {"style", "src", "href", "action"}
    for text in (page.text("script"), page.text("style")):
        assert not re.search(r"https?:|//cdn|\bfetch\(|\bimport\b|@import|url\(|innerHTML|outerHTML|\beval\b", text)


def test_the_script_is_all_of_the_folder_s():
    from importlib.resources import files

    folder = files("landmark_cli.inference.trace.page")
    assert sorted(SCRIPTS) == sorted(file.name[:-3] for file in folder.iterdir() if file.name.endswith(".js"))


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_a_text_that_looks_like_markup_is_data(text):
    texts = ["It was", text, f" before{text}after"]
    harmless, page = parsed(trace_with(["a", "b"])), parsed(trace_with(texts))
    assert page.tags == harmless.tags
    assert page.text("script") == harmless.text("script") and page.text("style") == harmless.text("style")
    content = content_of(trace_with(texts))
    assert (content["blocks"], content["tokens"], content["model"]) == (texts, texts, "".join(texts))
    assert "<" not in page.text("script", "application/json")


def test_a_page_s_markup_does_not_grow_with_the_text():
    short, long = (made_trace(length) for length in (3_000, 100_000))
    assert len(long.blocks) > 30 * len(short.blocks)
    assert parsed(long).tags == parsed(short).tags
    # Its bytes are the text's, and a few for each block that a head read.
    text, reads = sum(map(len, long.blocks)), sum(map(len, long.reads))
    empty = len(page_of(trace_with(["a"])))
    assert len(page_of(long)) - empty < 1.1 * text + 6 * reads


@given(
    st.lists(
        st.lists(
            st.builds(
                dict,
                layer=st.sampled_from([0, 3, 31]),
                head=st.integers(0, 5),
                block=st.sampled_from([0, 1, 255, 256, 65535, 65536, 4_000_000]),
                share=st.floats(0, 1, width=32),
            ),
            max_size=12,
            unique_by=lambda entry: (entry["layer"], entry["head"], entry["block"]),
        ),
        max_size=5,
    )
)
@settings(max_examples=60)
def test_packed_reads_are_those_that_were_packed(reads):
    reads = [sorted(entries, key=lambda entry: (entry["layer"], entry["head"])) for entries in reads]
    found = unpacked(json.loads(json.dumps(packed_reads(reads))))
    if any(reads):
        assert [[{**entry, "share": None} for entry in of_token] for of_token in found] == [
            [{**entry, "share": None} for entry in of_token] for of_token in reads
        ]
    for one, other in zip(found, reads, strict=False):
        for a, b in zip(one, other, strict=True):
            assert a["share"] == pytest.approx(b["share"], abs=0.51 / WHOLE)


# --- what is in it


@pytest.fixture(scope="module")
def tokenizers():
    """Tokenizers of transformers, and what makes a text's ids for each."""
    return [(GPT2.as_transformers(), GPT2.encode), (byte_tokenizer(), byte_ids)]


@given(st.text(max_size=80), st.sampled_from([1, 3, 4, 50]))
@settings(max_examples=100)
def test_the_texts_of_blocks_are_the_text(tokenizers, text, size):
    for tokenizer, encode in tokenizers:
        ids = encode(text)
        blocks = texts_of_blocks(tokenizer, ids, size)
        assert "".join(blocks) == text and len(blocks) == -(-len(ids) // size)
        # A block's text is that of its tokens, but for the characters that it shares.
        for at, block in enumerate(blocks):
            alone = tokenizer.decode(ids[at * size : (at + 1) * size])
            assert alone.strip("\ufffd") in block


def test_special_tokens_and_halves_of_characters_stand_in_blocks():
    tokenizer = byte_tokenizer()
    assert texts_of_blocks(tokenizer, [BEGIN, *byte_ids("ab")], 2) == ["<s>a", "b"]
    assert texts_of_blocks(tokenizer, byte_ids("aé東b"), 2) == ["a", "é", "東", "b"]
    assert texts_of_blocks(tokenizer, byte_ids("東")[:2], 1) == ["", "\ufffd"]


@pytest.fixture(scope="module")
def read_before(tmp_path_factory):
    """A model, and a file of what it has read before."""
    model, path = tiny_model(vocab_size=300, landmark_token_id=299), tmp_path_factory.mktemp("memory") / "memory"
    reader = BlockReader(model)
    for _ in reader.read([byte_ids("x" * 22)]):
        pass
    reader.save(path)
    return model, path


@pytest.mark.parametrize("memories", [0, 1, 2])
@pytest.mark.parametrize("new", [0, 1, 7])
def test_blocks_are_those_that_reads_name(read_before, memories, new):
    model, path = read_before
    tokenizer, prompt = byte_tokenizer(), byte_ids("the prompt's own text")
    reader = BlockReader(model, top_k_blocks=2)
    reader.recall(*[path] * memories) if memories else None
    sampling = SamplingSettings(max_new_tokens=new, temperature=0.0)
    (result,) = generate(model, tokenizer, [prompt], sampling, reader=reader, trace=True)
    trace = trace_of("a model", reader, tokenizer, result)
    # The incomplete block of all memories but the last is left out.
    before = "x" * (22 + (memories - 1) * 20) if memories else ""
    text = before + "the prompt's own text" + tokenizer.decode(result.tokens[:-1])
    assert "".join(trace.blocks) == text or "\ufffd" in text
    assert (trace.memory_tokens, trace.prompt_tokens) == (len(before), len(prompt))
    assert trace.blocks[1] == (before + "the prompt's own text")[4:8]
    assert len(trace.tokens) == new == len(trace.reads)
    assert all(read["block"] < len(trace.blocks) for reads in trace.reads for read in reads)
    content = content_of(trace)
    assert content["blocks"] == trace.blocks and content["reads"]["heads"] == (2 if new else 0)


def test_data_with_the_text_of_the_blocks(tmp_path):
    trace = trace_with(AWKWARD)
    write_trace(tmp_path / "new" / "trace.json", trace)
    text = (tmp_path / "new" / "trace.json").read_text()
    data = json.loads(text)
    assert list(data) == ["model", "memory_tokens", "prompt_tokens", "landmark_freq", "blocks", "tokens"]
    assert data["blocks"] == AWKWARD and [token["text"] for token in data["tokens"]] == AWKWARD
    assert [token["reads"] for token in data["tokens"]] == trace.reads
    # A block or a token a line.
    assert len(text.splitlines()) == 3 + 2 * len(AWKWARD)


# --- which file


@pytest.mark.parametrize("name", ["trace.txt", "trace", "trace.htm", "trace.json.gz", ".html"])
def test_another_ending_is_an_error(tmp_path, name):
    with pytest.raises(UsageError, match=r"--trace \S+: .* no kind of trace: name a file .html .* or .json"):
        check_trace(tmp_path / name)
    with pytest.raises(UsageError):
        write_trace(tmp_path / name, trace_with(["a"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "begin"), [("a.html", "<!doctype html>"), ("a.HTML", "<!doctype html>"), ("a.json", "{")]
)
def test_the_ending_says_what_is_written(tmp_path, name, begin):
    write_trace(tmp_path / name, trace_with(["a"]))
    assert (tmp_path / name).read_text().startswith(begin)
