"""Every reader keeps the same promises, and who reads knows nothing else of it."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import landmark_cli
from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.errors import UsageError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.readers import BaseReader, open_reader
from landmark_cli.inference.recurrent import RecurrentReader
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.inference.window import SeparateChunkReader, WindowReader
from tests.closeness import assert_close_norm, relative_error
from tests.tiny import FREQ, LANDMARK, VOCABULARY, tiny_baseline, tiny_llama, tiny_model, tiny_text

PACKAGE = Path(landmark_cli.__file__).parent
# Every block is retrieved, so a cut into chunks changes nothing.
ALL = {"top_k_blocks": 64, "chunk": 5}


def landmark_llama(attention="landmark"):
    model = tiny_llama(max_position_embeddings=64)
    config = model.config
    config.landmark_freq, config.landmark_token_id, config.trained_length, config.top_k_blocks = 4, LANDMARK, 40, 2
    model.set_attn_implementation(attention)
    return model


# Kind of model -> the model, how it reads, and which reader it gets.
KINDS = {
    "landmarks": (tiny_model(), ALL, {}, BlockReader),
    "context miss": (tiny_model(context_miss_token=True, n_layer=1), ALL | {"chunk": 1}, {}, BlockReader),
    "llama with landmarks": (landmark_llama(), ALL, {}, BlockReader),
    "transformer-xl": (tiny_baseline(memory_length=64, segment_length=5), {}, {}, RecurrentReader),
    "baseline": (tiny_baseline(), {}, {}, WindowReader),
    "llama": (tiny_llama(), {}, {}, WindowReader),
    "full attention": (landmark_llama("sdpa"), {}, {"window": 64}, WindowReader),
    "separate chunks": (tiny_model(), {"chunk": 5}, {"memory": False}, SeparateChunkReader),
    "separate chunks of a transformer-xl": (
        tiny_baseline(memory_length=3, segment_length=2),
        {"chunk": 5},
        {"memory": False},
        SeparateChunkReader,
    ),
}
TRACED = ["landmarks", "context miss", "llama with landmarks"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def reader_of(kind: str, batch: int = 2) -> BaseReader:
    model, reading, how, expected = KINDS[kind]
    reader = open_reader(model, ReadingSettings(**reading), batch=batch, **how)
    assert type(reader) is expected and (reader.model, reader.batch) == (model, batch)
    return reader


def texts(reader: BaseReader, length: int = 23) -> list[torch.Tensor]:
    return [tiny_text(length, 1), tiny_text(length if reader.equal_lengths else length - 6, 2)]


def read_all(reader: BaseReader, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits at every text token of every row."""
    found = [[] for _ in rows]
    for part in reader.read(rows):
        assert max(part.lengths) <= reader.chunk
        for row, logits in enumerate(found):
            assert part.begins[row] == sum(map(len, logits)) or not part.lengths[row]
            logits.append(part.row(row).clone())
            assert logits[-1].shape == (part.lengths[row], VOCABULARY)
    return [torch.cat(logits) for logits in found]


def last_of(reader: BaseReader, row: torch.Tensor) -> torch.Tensor:
    *_, part = reader.read([row], last_only=True)
    assert part.logits.shape == (1, 1, VOCABULARY)
    return part.logits[0, -1].clone()


def test_pieces_give_what_one_read_gives(kind):
    reader = reader_of(kind)
    rows = texts(reader)
    whole = read_all(reader, rows)
    assert [len(logits) for logits in whole] == [len(row) for row in rows]
    reader.reset()
    pieces = [read_all(reader, [row[begin:end] for row in rows]) for begin, end in ((0, 10), (10, 20), (20, None))]
    for row, logits in enumerate(whole):
        assert_close_norm(torch.cat([piece[row] for piece in pieces]), logits)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "context miss"])
def test_what_is_read_is_what_one_forward_pass_gives(kind):
    model, _, how, _ = KINDS[kind]
    reader = reader_of(kind, batch=1)
    text = tiny_text(23)
    expected = []
    for part in text.split(5) if "memory" in how else [text]:
        stream, kept = part, slice(None)
        if getattr(model.config, "landmark_freq", None) and "window" not in how:
            stream = insert_landmarks(part, FREQ, LANDMARK)
            kept = ~landmark_positions(len(stream), FREQ + 1)
        with torch.no_grad():
            expected.append(model(stream[None]).logits[0, kept])
    assert_close_norm(read_all(reader, [text])[0], torch.cat(expected))


def test_a_batch_gives_what_its_rows_give_alone(kind):
    rows = texts(reader_of(kind))
    together = read_all(reader_of(kind), rows)
    for row, logits in zip(rows, together, strict=True):
        assert_close_norm(read_all(reader_of(kind, batch=1), [row])[0], logits)


@pytest.mark.parametrize("last_only", [False, True])
def test_steps_after_a_read_give_what_reading_gives(kind, last_only):
    reader = reader_of(kind)
    rows = texts(reader)
    whole = read_all(reader, rows)
    reader.reset()
    for part, way in ((slice(10), not last_only), (slice(10, -2), last_only)):
        for _ in reader.read([row[part] for row in rows], last_only=way):
            pass
    for back in (-2, -1):
        logits = reader.step([int(row[back]) for row in rows])
        assert_close_norm(logits, torch.stack([one[back] for one in whole]))
    # A row that rests changes nothing for the other.
    first, again = reader_of(kind), reader_of(kind)
    for one in (first, again):
        for _ in one.read([row[:-2] for row in rows], last_only=last_only):
            pass
    for token in (3, 4):
        assert_close_norm(first.step([token, None])[0], again.step([token, token])[0])


def test_the_last_ones_are_the_last_of_all(kind):
    reader = reader_of(kind, batch=1)
    (row, _) = texts(reader)
    (whole,) = read_all(reader, [row])
    reader.reset()
    assert_close_norm(last_of(reader, row), whole[-1])


def test_reset_forgets_and_what_is_expected_changes_nothing(kind):
    reader = reader_of(kind)
    rows = texts(reader)
    fresh = read_all(reader, rows)
    reader.reset()
    reader.expect(100)
    again = read_all(reader, rows)
    assert all(map(torch.equal, fresh, again))
    assert reader.retrievals >= reader.dropped_retrievals >= 0


@pytest.mark.parametrize("length", [23, 70])
def test_it_sees_as_many_tokens_as_it_says(kind, length):
    reader = reader_of(kind, batch=1)
    seen = reader.sees(length)
    if reader.remembers and length > 23:
        assert seen == length
        return
    text = tiny_text(length)
    unchanged = last_of(reader, text)
    for at, differs in ((len(text) - seen, True), (len(text) - seen - 1, False)):
        if at < 0:
            continue
        reader.reset()
        changed = text.clone()
        changed[at] = (changed[at] + 1) % LANDMARK
        error = relative_error(last_of(reader, changed), unchanged)
        assert (error > 1e-5) == differs, (at, error)


def test_a_trace_or_its_refusal(kind):
    reader = reader_of(kind, batch=1)
    if kind not in TRACED:
        with pytest.raises(UsageError, match="--trace: the model has no landmarks, so it reads no blocks"):
            reader.trace()
        return
    reads_of = reader.trace()
    text = tiny_text(23)
    for _ in reader.read([text]):
        pass
    # Its own chunk's blocks are not retrieved; after the step the 24th token ends the sixth block.
    before = (len(text) - 1) // reader.chunk * reader.chunk // 4
    assert {read["block"] for read in reads_of(0)} == set(range(before))
    reader.step([3])
    assert {read["block"] for read in reads_of(0)} == set(range(23 // 4))
    assert {read["layer"] for read in reads_of(0)} == set(range(reader.model.config.num_hidden_layers))
    assert all(0 <= read["share"] <= 1 for read in reads_of(0))


def test_rows_have_to_be_as_many_as_the_reader_reads(kind):
    with pytest.raises(ValueError, match="2 rows given to a reader of 3"):
        next(reader_of(kind, batch=3).read([tiny_text(3)] * 2))
    reader, other = reader_of(kind, batch=2), reader_of(kind, batch=2)
    for one in (reader, other):
        next(one.read([tiny_text(3)] * 2))
    with pytest.raises(ValueError, match="1 row given to a reader of 2"):
        reader.step([1])
    # Nothing was read of it.
    assert torch.equal(reader.step([2, 3]), other.step([2, 3]))


@pytest.mark.parametrize("token", [-1, VOCABULARY, 1 << 40])
def test_a_token_that_the_model_does_not_have_is_named(kind, token):
    with pytest.raises(ValueError, match=rf"the token {token}, and the model has tokens 0 to \d+$"):
        next(iter(reader_of(kind).read([[1, token], [2, 3]])))


def test_the_block_reader_s_earlier_name():
    from landmark_cli.inference.reader import Reader

    assert Reader is BlockReader and Reader(tiny_model(), top_k_blocks=2, chunk=8).chunk == 8


def test_the_recurrence_takes_rows_of_one_length():
    with pytest.raises(ValueError, match=r"expected 2 of one length, found lengths \[5, 4\]"):
        next(reader_of("transformer-xl").read([tiny_text(5), tiny_text(4)]))


@pytest.mark.parametrize("kind", ["baseline", "llama"])
def test_a_window_leaves_room_unless_nothing_more_is_expected(kind):
    model, text = KINDS[kind][0], tiny_text(50)
    for expected, kept in ((None, 24), (51, 24), (50, 32)):
        reader = WindowReader(model, window=32)
        if expected is not None:
            reader.expect(expected)
        (part,) = reader.read([text])
        assert (part.lengths, part.begins) == ([kept], [50 - kept])
        with torch.no_grad():
            assert_close_norm(part.row(0), model(text[None, -kept:]).logits[0])


@pytest.mark.parametrize("kind", [BlockReader, RecurrentReader, WindowReader, SeparateChunkReader])
@pytest.mark.parametrize("name", ["read", "step", "reset", "expect", "sees", "trace", "save", "recall"])
def test_all_are_called_alike(kind, name):
    def shape(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(getattr(cls, name)).parameters.values()]

    assert shape(kind) == shape(BaseReader)


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, and `module.name` for names from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(["landmark_cli", *path.relative_to(PACKAGE).parent.parts][: -node.level + 1 or None])
            module = f"{package}.{node.module}" if node.level else node.module
            found.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
    return found


def test_one_place_knows_the_kinds_of_readers():
    modules = {"landmark_cli.inference." + name for name in ("reader", "block_reader", "recurrent", "window")}
    knowing = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if imported(path) & modules}
    # And reader.py, which has a name for programs, the package, which gives it to them, and what is of the block cache
    # alone: memories of what was read through it, and the trace of what it read.
    of_the_cache = {f"inference/{name}.py" for name in ("memory_fit", "reader_memory", "trace/contents")}
    assert knowing == {"inference/readers.py", "inference/reader.py", "__init__.py"} | of_the_cache
    known = imported(PACKAGE / "inference" / "readers.py")
    assert {module.removeprefix("landmark_cli.inference.") for module in known & modules} == {
        "block_reader",
        "recurrent",
        "window",
    }


READING = [
    "inference/generation.py",
    *(f"evaluation/{name}.py" for name in ("perplexity", "harness", "prompts", "longppl")),
]


@pytest.mark.parametrize("user", READING)
def test_who_reads_asks_for_no_kind_of_model(user):
    source = (PACKAGE / user).read_text()
    kinds = ("isinstance(reader", "has_landmarks", "landmark_freq", "memory_length", "context_miss", "reader.cache")
    for name in kinds:
        assert name not in source, name
