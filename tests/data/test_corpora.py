"""Where documents come from: local layouts, file formats, hub copies (as local folders), and what is not there."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.commands.prepare import PrepareOptions
from landmark_cli.data import corpora
from landmark_cli.data.corpora import KINDS, HubCopy, Selection, is_arxiv, on_the_hub, open_corpus
from landmark_cli.data.documents import BadText, cut_before, text_document, text_file
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.options import settings_of

ROWS = [{"text": f"row {i} é"} for i in range(5)]


def texts(corpus, limit=1 << 20):
    """The documents of each split, in order."""
    found = {}
    for split, document in corpus.documents():
        found.setdefault(split, []).append(b"".join(document.pieces(limit)).decode())
    return found


def write_lines(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        middle = len(data) // 2
        data = b"".join(zstandard.compress(half) for half in (data[:middle], data[middle:]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def test_the_sample_holds_one_novel_out():
    corpus = open_corpus("sample")
    found = texts(corpus)
    assert [len(found[split]) for split in ("train", "validation")] == [5, 1]
    assert "Anne Elliot" in found["validation"][0] and "Anne Elliot" not in "".join(found["train"])
    assert sum(len(text.encode()) for novels in found.values() for text in novels) == corpus.total_bytes


def test_pg19_layout(tmp_path):
    for split, numbers in {"train": (10, 9), "validation": (3,), "test": (4, 5)}.items():
        for number in numbers:
            write_text(tmp_path / split / f"{number}.txt", f"book {number}")
    write_text(tmp_path / "README.txt", "not a book")
    write_text(tmp_path / "train" / ".hidden.txt", "not a book")
    corpus = open_corpus("pg19", [str(tmp_path)])
    assert texts(corpus) == {"train": ["book 10", "book 9"], "validation": ["book 3"], "test": ["book 4", "book 5"]}
    assert corpus.total_bytes == len("book 10") + 4 * len("book 9")
    assert texts(open_corpus("pg19", [str(tmp_path)], max_documents=1))["train"] == ["book 10"]


def test_hub_style_parquet_names_make_splits(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[2:4])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS[4:])
    found = texts(open_corpus("pg19", [str(tmp_path)]))
    assert found == {"train": [row["text"] for row in ROWS[:4]], "validation": [ROWS[4]["text"]]}


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_rows_of_every_format(tmp_path, ending):
    write = write_parquet if ending == ".parquet" else write_lines
    write(tmp_path / f"rows{ending}", [{"body": row["text"], "n": 1} for row in ROWS])
    corpus = open_corpus("text", [str(tmp_path / f"rows{ending}")], text_field="body", validation_share=0)
    assert texts(corpus) == {"train": [row["text"] for row in ROWS]}
    wrong = open_corpus("text", [str(tmp_path)])
    with pytest.raises(BadText, match=f"rows{ending}.* has no text field 'text', only .*body, n: .*--text-field"):
        texts(wrong)


def test_text_takes_files_and_folders_in_order(tmp_path):
    for name in ("b.md", "a/z.txt", "a/y.tex", "c.log"):
        write_text(tmp_path / name, name)
    write_lines(tmp_path / "rows.jsonl", ROWS[:1])
    sources = [str(tmp_path / "b.md"), str(tmp_path / "a"), str(tmp_path / "rows.jsonl")]
    found = texts(open_corpus("text", sources, validation_share=0))
    assert found == {"train": ["b.md", "a/y.tex", "a/z.txt", "row 0 é"]}


def test_a_share_of_the_files_is_held_out(tmp_path):
    for number in range(40):
        write_text(tmp_path / f"{number:02}.txt", str(number))
    found = texts(open_corpus("text", [str(tmp_path)], validation_share=0.1))
    assert found["validation"] == ["5", "15", "25", "35"] and len(found["train"]) == 36
    assert len(texts(open_corpus("text", [str(tmp_path)]))["validation"]) == 1
    assert "validation" not in texts(open_corpus("text", [str(tmp_path)], validation_share=0))


def test_a_share_of_rows_is_held_out(tmp_path):
    write_lines(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(40)])
    assert texts(open_corpus("text", [str(tmp_path)], validation_share=0.1))["validation"] == ["0", "10", "20", "30"]


def test_a_single_text_file_is_cut_at_a_line(tmp_path):
    lines = [f"line number {i}\n" for i in range(1000)]
    write_text(tmp_path / "book.txt", "".join(lines))
    found = texts(open_corpus("text", [str(tmp_path / "book.txt")], validation_share=0.1))
    assert found["train"][0] + found["validation"][0] == "".join(lines)
    assert found["validation"][0].startswith("line number") and found["train"][0].endswith("\n")
    assert len(found["validation"][0]) == pytest.approx(0.1 * len("".join(lines)), rel=0.02)


META = [
    ({"config": "arxiv", "file": "x"}, True),
    ({"config": "formal", "n": 1}, False),
    (json.dumps({"config": "arxiv"}), True),
    ("{'config': 'arxiv'}", True),
    ("{'config': 'wiki'}", False),
    ("no meta at all", False),
    (None, True),
]


def test_arxiv_rows_are_told_by_their_meta():
    assert [is_arxiv({"meta": meta}) for meta, _ in META] == [wanted for _, wanted in META]
    assert is_arxiv({})


@pytest.fixture
def proof_pile(tmp_path):
    rows = [{"text": f"{i}", "meta": meta} for i, (meta, _) in enumerate(META)]
    write_lines(tmp_path / "train" / "proofpile_train_0.jsonl.gz", rows)
    write_lines(tmp_path / "train" / "proofpile_train_1.jsonl.gz", rows[::-1])
    write_lines(tmp_path / "dev" / "proofpile_dev.jsonl.gz", rows)
    write_lines(tmp_path / "test" / "proofpile_test.jsonl.gz", rows)
    write_text(tmp_path / "README.md", "about")
    kept = [row["text"] for row, (_, wanted) in zip(rows, META, strict=True) if wanted]
    return tmp_path, {"train": kept + kept[::-1], "validation": kept, "test": kept}


def test_arxiv_math_from_a_local_copy(proof_pile):
    folder, expected = proof_pile
    assert texts(open_corpus("arxiv-math", [str(folder)])) == expected


def test_arxiv_math_through_datasets(proof_pile):
    folder, expected = proof_pile
    hub = HubCopy(str(folder), data_files=KINDS["arxiv-math"].hub.data_files)
    assert texts(on_the_hub("arxiv-math", hub, Selection(keep=is_arxiv))) == expected


def test_what_is_found_is_said_before_any_of_it_is_read(proof_pile, capsys):
    folder, _ = proof_pile
    hub = HubCopy(str(folder), data_files=KINDS["arxiv-math"].hub.data_files)
    for find, expected in (
        (lambda: open_corpus("sample"), ["train: emma, ", "validation: persuasion\n"]),
        (lambda: open_corpus("arxiv-math", [str(folder)]), ["found train: 2 .jsonl.gz files", "left out: 1 "]),
        (lambda: on_the_hub("arxiv-math", hub, Selection()), ["found the splits train, validation, test\n"]),
    ):
        find()
        said = capsys.readouterr().err
        assert all(words in said for words in expected), said


def test_pg19_through_datasets(tmp_path):
    for split, rows in {"train": ROWS[:3], "validation": ROWS[3:4], "test": ROWS[4:]}.items():
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", rows)
    corpus = on_the_hub("pg19", HubCopy(str(tmp_path)), Selection())
    expected = [row["text"] for row in ROWS]
    assert texts(corpus) == {"train": expected[:3], "validation": expected[3:4], "test": expected[4:]}
    assert texts(on_the_hub("pg19", HubCopy(str(tmp_path)), Selection(max_documents=2)))["train"] == expected[:2]


def test_redpajama_through_datasets_and_from_a_local_copy(tmp_path):
    rows = [{"text": str(i), "meta": {"source": i} if i % 2 else "x"} for i in range(20)]
    write_lines(tmp_path / "arxiv_sample.jsonl", rows[:10])
    write_lines(tmp_path / "c4_sample.jsonl", rows[10:])
    hub = HubCopy(str(tmp_path), data_files=KINDS["redpajama"].hub.data_files)
    expected = {"validation": ["0", "10"], "train": [str(i) for i in range(20) if i % 10]}
    assert texts(on_the_hub("redpajama", hub, Selection(validation_share=0.1))) == expected
    assert texts(open_corpus("redpajama", [str(tmp_path)], validation_share=0.1)) == expected


def test_a_source_that_is_not_here_is_looked_for_on_the_hub(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(corpora, "on_the_hub", lambda name, hub, selection: asked.append((name, hub)))
    open_corpus("pg19")
    open_corpus("pg19", revision="refs/convert/parquet")
    open_corpus("text", ["somebody/texts"], subset="en")
    open_corpus("arxiv-math")
    assert asked == [
        ("pg19", HubCopy("emozilla/pg19")),
        ("pg19", HubCopy("emozilla/pg19", "refs/convert/parquet")),
        ("text", HubCopy("somebody/texts", None, "en")),
        ("arxiv-math", KINDS["arxiv-math"].hub),
    ]
    assert "there is no file or folder somebody/texts; opening" in capsys.readouterr().err


def test_hub_copies_that_do_not_open(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [{"body": "x"}])
    with pytest.raises(LandmarkError, match="has no text field 'text', only the columns body"):
        on_the_hub("pg19", HubCopy(str(tmp_path)), Selection())
    with pytest.raises(LandmarkError, match="cannot open the data set .*nowhere.*--source names another"):
        on_the_hub("pg19", HubCopy(str(tmp_path / "nowhere")), Selection())
    write_parquet(tmp_path / "two" / "test-00000-of-00001.parquet", ROWS)
    with pytest.raises(LandmarkError, match="no split named train, only test"):
        on_the_hub("pg19", HubCopy(str(tmp_path / "two")), Selection())
    scripted = tmp_path / "scripted"
    write_text(scripted / "scripted.py", "import datasets")
    with pytest.raises(LandmarkError, match="refs/convert/parquet"):
        on_the_hub("pg19", HubCopy(str(scripted)), Selection())


@pytest.mark.parametrize(
    ("name", "sources", "more", "error", "message"),
    [
        ("sample", ["x"], {}, UsageError, "landmark prepare text"),
        ("text", None, {}, UsageError, "which text.*--source"),
        ("text", ["{tmp}/nothing"], {}, LandmarkError, "no file or folder .*nothing"),
        ("pg19", ["{tmp}/nothing", "{tmp}"], {}, LandmarkError, "no file or folder .*nothing"),
        ("pg19", ["./nothing"], {}, LandmarkError, "no file or folder nothing"),
        ("text", ["some/notes.txt"], {}, LandmarkError, "no file or folder some/notes.txt"),
        ("pg19", ["{tmp}/empty"], {}, LandmarkError, r"no documents in .*empty: it holds no file .*\.txt"),
        ("redpajama", ["{tmp}/book.txt"], {}, LandmarkError, r"not of a kind .*\.jsonl"),
        ("arxiv-math", ["{tmp}/book.txt"], {}, LandmarkError, r"not of a kind .*\.jsonl"),
        ("text", ["/dev/null"], {}, LandmarkError, "not of a kind"),
        ("pg19", ["{tmp}/test-only"], {}, LandmarkError, "has a test split but no training documents"),
        ("text", ["{tmp}/book.txt"], {"revision": "x"}, UsageError, "--revision and --subset are for copies"),
    ],
)
def test_sources_that_cannot_be_prepared(tmp_path, monkeypatch, name, sources, more, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "empty" / "picture.png", "x")
    write_text(tmp_path / "book.txt", "x")
    write_text(tmp_path / "test-only" / "test" / "1.txt", "x")
    sources = sources and [source.format(tmp=tmp_path) for source in sources]
    with pytest.raises(error, match=message):
        open_corpus(name, sources, **more)


BAD = {
    "latin-1": (b"caf\xe9 " * 10, "not UTF-8 at byte 3"),
    "cut short": ("é".encode()[:1], "not UTF-8 at byte 0"),
    "late": (b"word " * 1000 + b"\xff" + b" word" * 1000, "not UTF-8 at byte 5000"),
}


@pytest.mark.parametrize("limit", [100, 1 << 20])
@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_not_utf8_is_named_before_any_of_it_is_used(tmp_path, kind, limit):
    data, message = BAD[kind]
    write_text(tmp_path / "bad.txt", data)
    pieces = text_file(tmp_path / "bad.txt").pieces(limit)
    with pytest.raises(BadText, match=rf"bad\.txt: {message}"):
        next(pieces)


def test_rows_that_are_no_text_are_named(tmp_path):
    lines = [b'{"text": "good"}', b"{", b'{"text": "\\ud800"}', b'{"text": 5}', b'{"text": "\xff"}', b'{"text": null}']
    write_text(tmp_path / "rows.jsonl", b"\n".join(lines))
    documents = list(open_corpus("text", [str(tmp_path / "rows.jsonl")], validation_share=0).documents())
    found = []
    for _, document in documents:
        try:
            found.append(b"".join(document.pieces(100)).decode())
        except BadText as bad:
            found.append(str(bad).partition("rows.jsonl:")[2])
    assert found[0] == "good" and found[5] == ""
    starts = ("2: not JSON", "3: has half of a surrogate", "4: the field 'text' holds no text", "5: not UTF-8")
    assert [text.startswith(start) for text, start in zip(found[1:5], starts, strict=True)] == [True] * 4
    column = pa.array([b"good", b"\xff"], pa.binary()).cast(pa.string(), safe=False)
    parquet.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    good, bad = open_corpus("text", [str(tmp_path / "rows.parquet")], validation_share=0).documents()
    assert list(good[1].pieces(9)) == [b"good"]
    with pytest.raises(BadText, match=r"rows\.parquet, row 2: not UTF-8"):
        list(bad[1].pieces(9))


def test_a_broken_parquet_file_is_named(tmp_path):
    write_text(tmp_path / "rows.parquet", b"PAR1 and no more")
    with pytest.raises(BadText, match=r"rows\.parquet is not a parquet file"):
        texts(open_corpus("text", [str(tmp_path / "rows.parquet")]))


def test_byte_order_marks_are_no_text(tmp_path):
    write_text(tmp_path / "a.txt", b"\xef\xbb\xbfwords and words")
    assert b"".join(text_file(tmp_path / "a.txt").pieces(100)) == b"words and words"
    assert b"".join(text_file(tmp_path / "a.txt").pieces(6)) == b"words and words"


def test_a_file_that_shrinks_is_noticed(tmp_path):
    write_text(tmp_path / "a.txt", "words " * 100)
    document = text_file(tmp_path / "a.txt")
    write_text(tmp_path / "a.txt", "words")
    with pytest.raises(BadText, match="became shorter"):
        list(document.pieces(1000))


words = st.text(st.sampled_from("ab'1. \n\t\r\u00a0é中.!\U0001f642"), min_size=1, max_size=300)


@settings(max_examples=200)
@given(words, st.integers(8, 100))
def test_pieces_are_the_text_and_keep_to_the_limit(tmp_path_factory, text, limit):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    for document in (text_file(path), text_document("memory", text)):
        pieces = list(document.pieces(limit))
        assert b"".join(pieces) == text.encode()
        assert all(len(piece) <= limit for piece in pieces)
        for piece in pieces:
            piece.decode()


parts = st.sampled_from(["word", "it's", "1859", "...", '"Oh!"', "\n", "\n\n", " ", "  ", "é", "\t"])


@settings(max_examples=200)
@given(st.lists(parts, max_size=60).map(" ".join).map(str.encode))
def test_cutting_at_lines_and_spaces_keeps_the_ids(text):
    gpt2 = load_gpt2()
    place = cut_before(text, len(text) * 2 // 3)
    at_line = re.fullmatch(rb"[!-~]\n[!-~]", text[max(0, place - 2) : place + 1])
    at_space = re.fullmatch(rb"[!-~] [!-~]", text[max(0, place - 1) : place + 2])
    if at_line or at_space:
        left, right = text[:place].decode(), text[place:].decode()
        assert gpt2.encode(left) + gpt2.encode(right) == gpt2.encode(text.decode())


def load_gpt2(made=[]):  # noqa: B006 (one tokenizer for all of a property's examples)
    if not made:
        made.append(load_tokenizer("gpt2"))
    return made[0]


def test_cutting_prefers_lines_over_spaces_over_characters():
    assert cut_before(b"one two\nthree four", 14) == 8
    assert cut_before(b"one two three", 9) == 7
    assert cut_before("ééé".encode(), 3) == 2


def test_commands_name_every_corpus():
    """In words of their own, because options must not import what corpora do."""
    corpus = settings_of(PrepareOptions)["corpus"]
    assert set(corpus.choices) == {"sample", *KINDS, "passkey", "tasks"}
    assert all(name in corpus.metadata["help"] for name in corpus.choices)
    help_of_data = settings_of(FinetuneOptions)["data"].metadata["help"]
    assert all(name in help_of_data for name in KINDS if KINDS[name].hub)
