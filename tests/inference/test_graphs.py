"""Recorded chunks give what unrecorded ones give."""

import copy
from dataclasses import replace

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, RetrievalSettings, Trace
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.inference import graphs
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.graphs import ChunkForward
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.serving.engine import Engine
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder
from tests.tiny import tiny_llama, tiny_model, tiny_text


def read(reader: BlockReader, rows: list[torch.Tensor], steps: int) -> tuple[list[torch.Tensor], list]:
    """Logits of all chunks and steps, and what the steps' queries read."""
    reader.cache.trace = Trace()
    found = [chunk.logits.clone() for chunk in reader.read(rows)]
    reads = []
    for at in range(steps):
        tokens = [(7 * at + row) % 30 if (at + row) % 5 else None for row in range(len(rows))]
        found.append(reader.step(tokens))
        reads.append([reader.cache.trace.read_by(row, -1) for row, token in enumerate(tokens) if token is not None])
    return found, reads


class Repeated:
    """Stands in for a CUDA graph where there is none: does the same again, knowing nothing of what has changed but what
    the memory says that a graph would read."""

    def __init__(self, function, device, pool):
        self.function, self.output, self.pool = function, function().clone(), None

    def replay(self) -> None:
        self.output.copy_(self.function())


def test_nothing_but_the_counters_says_what_has_been_read(monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")
    model, rows = tiny_model(n_layer=1), [tiny_text(28, 1), tiny_text(18, 2)]
    recorded, plain = (BlockReader(model, batch=2, chunk=8, top_k_blocks=2) for _ in range(2))
    recorded.forward.recording, recorded.forward.record = True, Repeated
    # What a graph would have recorded of a trace this stand-in does not write again, so only logits are compared.
    for a, b in zip(read(recorded, rows, 5)[0], read(plain, rows, 5)[0], strict=True):
        assert_close_norm(a, b)
    assert {kind[0] for kind in recorded.forward._recorded} >= {1, 2}


def test_what_is_read_without_a_graph_leaves_the_traces_of_graphs_alone(monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")
    reader, traced = BlockReader(tiny_model(n_layer=1), chunk=8, top_k_blocks=2), {}
    reader.forward.recording, reader.forward.record = True, Repeated
    record = ChunkForward._record

    def remember(self, *args):
        done = record(self, *args)
        kind = list(self._recorded)[-1]
        traced[kind] = self._recorded[kind].traced[0]
        return done

    monkeypatch.setattr(ChunkForward, "_record", remember)
    read(reader, [tiny_text(44, 1)], 14)
    assert len(traced) >= 3
    assert all(kept.traced[0] is traced[kind] for kind, kept in reader.forward._recorded.items())


@pytest.fixture
def records(monkeypatch):
    """The kinds that are recorded, in order."""
    found, plain = [], ChunkForward._record

    def record(self, *given):
        done = plain(self, *given)
        ids, _, kept, rows = given
        found.append(self._kind(ids, kept, rows)[:3])
        return done

    monkeypatch.setattr(ChunkForward, "_record", record)
    return found


@pytest.fixture
def by_definition(monkeypatch):
    """The definition reads, which is quick, and stands in for what can be recorded: Repeated does not mind."""
    monkeypatch.setenv("LANDMARK_ATTENTION", "eager")
    monkeypatch.setitem(graphs.BACKENDS, "eager", replace(graphs.BACKENDS["eager"], recorded=True))


@pytest.mark.parametrize(
    "lengths, kinds",
    [
        ([44], [(1, 1, True), (2, 1, True)]),
        ([44, 40], [(1, 1, True), (2, 1, True)]),
        ([44, 26], [(1, 1, True), (2, 2, True)]),
    ],
    ids=str,
)
def test_steps_are_recorded_while_the_prompt_is_read(lengths, kinds, records, by_definition):
    rows = [tiny_text(length, seed) for seed, length in enumerate(lengths)]
    recorded, plain = (BlockReader(tiny_model(n_layer=1), batch=len(rows), chunk=16) for _ in range(2))
    recorded.forward.recording, recorded.forward.record = True, Repeated
    recorded.expect(60, steps=8)
    found = [chunk.logits for chunk in recorded.read(rows)]
    assert records == kinds
    expected = [chunk.logits for chunk in plain.read(rows)]
    for step in range(8):
        found.append(recorded.step([step] * len(rows)))
        expected.append(plain.step([step] * len(rows)))
    assert records == kinds
    # The definition takes lengths from the host, so what was recorded fits rows alone that are in step.
    in_step = kinds[-1][1] == 1
    for ours, theirs in zip(found, expected, strict=True) if in_step else ():
        assert_close_norm(ours, theirs)


@pytest.mark.parametrize("length, steps, expected", [(44, 0, 0), (44, 7, 0), (16, 9, 0), (44, 8, 2)])
def test_steps_that_do_not_come_are_not_recorded(length, steps, expected, records, by_definition):
    """Nor are those after a text of one chunk, which would come later for it."""
    reader = BlockReader(tiny_model(n_layer=1), chunk=16)
    reader.forward.recording, reader.forward.record = True, Repeated
    reader.expect(60, steps=steps)
    list(reader.read([tiny_text(length)], last_only=True))
    assert len(records) == expected


def test_graphs_of_steps_are_the_last_to_go(by_definition, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    reader = BlockReader(tiny_model(n_layer=1), chunk=8)
    reader.forward.recording, reader.forward.record = True, Repeated
    reader.expect(100, steps=10)
    list(reader.read([tiny_text(80)], last_only=True))
    assert [kind[0] for kind in reader.forward._recorded if kind[0] > 2] == [10]
    assert {kind[:2] for kind in reader.forward._recorded} >= {(1, 1), (2, 1)}


def test_a_server_records_steps_alone():
    """Each of its prompts is a chunk of another width, and recording would hold up everybody's tokens."""
    plain = BlockReader(tiny_model(), batch=2).forward
    server = Engine(tiny_model(), None, ReadingSettings(), rows=2, queue=0).reader.forward
    for forward in (plain, server):
        assert not forward.records(2, 1)
        forward.recording = True
    assert [[forward.records(2, width) for width in (1, 2, 3)] for forward in (plain, server)] == [
        [True, True, True],
        [True, True, False],
    ]


@pytest.mark.parametrize("backend", ["eager", "blockwise"])
def test_what_has_no_fixed_shapes_is_never_recorded(backend, monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", backend)
    reader = BlockReader(tiny_model(n_layer=1), batch=2, chunk=8)
    reader.forward.recording, reader.forward.record = True, Repeated
    read(reader, [tiny_text(20, 1), tiny_text(9, 2)], 3)
    assert not reader.forward.recording and not reader.forward._recorded


@pytest.mark.parametrize(
    ("offload", "used"),
    [
        ("none", False),
        ("cpu", True),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("none", True), ("cpu", False)]),
    ],
    ids=lambda x: {False: "a fresh reader", True: "one that has read"}.get(x, x),
)
def test_nothing_is_recorded_while_blocks_are_fetched_and_that_ends(monkeypatch, tmp_path, used, offload):
    monkeypatch.setattr(graphs, "MOST_FETCHING", 2)
    model = tiny_model(n_layer=1)
    kept, recorded, plain = (BlockReader(model, chunk=8, top_k_blocks=2, offload=offload) for _ in range(3))
    for each in (kept, plain):
        list(each.read([tiny_text(61, 1)]))
    kept.save(tmp_path / "novel")
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")
    recorded.forward.recording, recorded.forward.record = True, Repeated
    if used:
        list(recorded.read([tiny_text(9, 2)]))
    recorded.recall(tmp_path / "novel")
    assert recorded.cache.fetching
    logits = [plain.step([step]) for step in range(5)]
    for step in range(5):
        assert_close_norm(recorded.step([step]), logits[step])
        assert recorded.cache.fetching == (step < 2)
        assert step >= 2 or not recorded.forward._recorded
    assert recorded.forward._recorded
    # What is asked a second time is fetched before anything else is read.
    again = BlockReader(model, chunk=8, top_k_blocks=2, offload=offload)
    again.forward.recording, again.forward.record = True, Repeated
    for asked in range(3):
        again.recall(tmp_path / "novel")
        assert_close_norm(again.step([0]), logits[0])
        assert again.cache.fetching == (asked == 0)
    assert again.forward._recorded


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}, {"offload": "cpu", "cache_blocks": 6}], ids=str)
def test_a_gpu_reads_on_from_a_file(options, tmp_path):
    model = tiny_model(n_head=2, n_embd=32).cuda()
    kept, later = (BlockReader(model, chunk=8, **options) for _ in range(2))
    read(kept, [tiny_text(150, 1)], 0)
    kept.save(tmp_path / "novel")
    later.recall(tmp_path / "novel")
    for a, b in zip(read(later, [tiny_text(20, 2)], 40)[0], read(kept, [tiny_text(20, 2)], 40)[0], strict=True):
        assert_close_norm(a, b)
    assert later.forward._recorded and not later.cache.fetching
    answers = []
    for _ in range(4):
        later.reset()
        later.recall(tmp_path / "novel")
        answers.append(read(later, [tiny_text(20, 2)], 5)[0])
    assert all(map(torch.equal, answers[-1], answers[-2])) and not later.cache.fetching
    for a, b in zip(answers[0], answers[-1], strict=True):
        assert_close_norm(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k_blocks": 3, "cache_blocks": 6},
        {"selection": "max_over_query_heads"},
        {"selection": "max_over_heads"},
        {"selection": "max_over_tokens"},
        {"positions": "absolute"},
        {"offload": "cpu"},
        {"top_k_blocks": 0},
    ],
    ids=str,
)
def test_graphs_change_nothing(options):
    model = tiny_model(n_head=2, n_embd=32).cuda()
    rows = [tiny_text(200, 1), tiny_text(153, 2), tiny_text(9, 3)]
    recorded, plain = (BlockReader(model, batch=3, **{"chunk": 8, **options}) for _ in range(2))
    plain.forward.recording = False
    for _ in range(2):
        ours, our_reads = read(recorded, rows, 30)
        theirs, their_reads = read(plain, rows, 30)
        for a, b in zip(ours, theirs, strict=True):
            assert_close_norm(a, b)
        assert [[(r["head"], r["block"]) for r in row] for step in our_reads for row in step] == [
            [(r["head"], r["block"]) for r in row] for step in their_reads for row in step
        ]
        assert len(recorded.forward._recorded) >= 2
        recorded.reset()
        plain.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=str)
def test_the_first_step_after_a_prompt_replays_a_graph(options, dtype, records):
    model = tiny_model(n_head=2, n_embd=32).to("cuda", dtype)
    recorded, plain = (BlockReader(model, chunk=16, **options) for _ in range(2))
    plain.forward.recording = False
    # Whose products round otherwise than those of a chunk.
    recorded.passage_tokens = 0
    recorded.expect(300, steps=50)
    prompt = [tiny_text(200)]
    for a, b in zip(recorded.read(prompt, last_only=True), plain.read(prompt, last_only=True), strict=True):
        assert_close_norm(a.logits, b.logits)
    done = list(records)
    assert {kind[0] for kind in done} >= {1, 2}
    for step in range(50):
        assert_close_norm(recorded.step([step % 30]), plain.step([step % 30]))
    assert records == done


@pytest.mark.gpu
def test_a_gpu_reads_what_the_cpu_reads():
    model = tiny_model(n_head=2, n_embd=32)
    rows = [tiny_text(90, 1), tiny_text(40, 2)]
    ours, _ = read(BlockReader(copy.deepcopy(model).cuda(), batch=2, chunk=8), rows, 20)
    theirs, _ = read(BlockReader(model, batch=2, chunk=8), rows, 20)
    for a, b in zip(ours, theirs, strict=True):
        assert_close_norm(a.cpu(), b)


@pytest.mark.gpu
def test_a_decoder_of_the_library_is_recorded():
    from transformers import LlamaForCausalLM

    config = tiny_llama(hidden_size=32).config
    config.landmark_freq, config.landmark_token_id, config.trained_length, config.top_k_blocks = 4, 39, 40, 2
    config._attn_implementation = "landmark"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().cuda()
    recorded, plain = (BlockReader(model, batch=1, chunk=8) for _ in range(2))
    plain.forward.recording = False
    for a, b in zip(read(recorded, [tiny_text(60)], 12)[0], read(plain, [tiny_text(60)], 12)[0], strict=True):
        assert_close_norm(a, b)
    assert recorded.forward._recorded


@pytest.mark.gpu
def test_a_model_that_cannot_be_recorded_is_read_all_the_same(monkeypatch, capsys):
    model = tiny_model(n_head=2, n_embd=32).cuda()
    forward = model.forward

    def waits(*args, **kwargs):
        torch.cuda.current_stream().synchronize()
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", waits)
    reader = BlockReader(model, chunk=8)
    assert isinstance(reader.forward, ChunkForward)
    found, _ = read(reader, [tiny_text(60)], 5)
    assert all(logits.isfinite().all() for logits in found)
    assert not reader.forward.recording
    assert "without CUDA graphs" in capsys.readouterr().err
    # A sampled token can still be drawn.
    assert torch.rand(3, device="cuda").unique().numel() == 3


def most_tokens(model) -> int:
    """Of a chunk that is recorded, in millions."""
    forward = ChunkForward(model, BlockCache(RetrievalSettings(5, 2), default_inverse_frequencies(8)))
    forward.recording = True
    return next(millions for millions in range(1 << 20) if not forward.records(1, (millions << 20) + 1))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_words_do_not_keep_a_gpu_busy(family):
    """Chunks of a model with a large vocabulary are recorded as those of one with a small one."""
    few, many = (most_tokens(tiny_decoder(family, vocab_size=words)) for words in (300, 3000))
    assert few == many > 0


def test_more_layers_are_recorded_as_few_are():
    """Each has its kernels launched while the one before runs: whether the host keeps up is a layer's matter."""
    few, many = (most_tokens(tiny_decoder("llama", num_hidden_layers=layers)) for layers in (2, 8))
    assert few == pytest.approx(many, rel=0.02)


@pytest.mark.parametrize("seen, recorded", [(1, [3, 4]), (3, [4]), (4, [])])
def test_chunks_that_few_rows_have_are_recorded_where_there_are_many(seen, recorded, by_definition, monkeypatch):
    """The row that goes on has two chunks with a number of blocks of three bits, then four with one of four."""
    monkeypatch.setattr(graphs, "SEEN_OF_SOME", seen)
    reader = BlockReader(tiny_model(n_layer=1), batch=2, chunk=8)
    reader.forward.recording, reader.forward.record = True, Repeated
    reader.expect(64)
    list(reader.read([tiny_text(16, 1), tiny_text(64, 2)], last_only=True))
    assert [kind[2] for kind in reader.forward._recorded if kind[3] == 1] == recorded


def test_what_more_graphs_have_displaced_is_not_recorded_whenever_it_comes(records, by_definition, monkeypatch):
    """Of a text that is read again and again, with twice as many kinds of chunks as there is room for."""
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    reader = BlockReader(tiny_model(n_layer=1), chunk=8)
    reader.forward.recording, reader.forward.record = True, Repeated
    reader.expect(64)
    counts = []
    for _ in range(3):
        list(reader.read([tiny_text(64)], last_only=True))
        reader.reset()
        counts.append(len(records))
    assert counts == [2, 6, 6]
