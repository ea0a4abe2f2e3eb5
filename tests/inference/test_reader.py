"""Chunked reading: rows, splits and steps change nothing that they should not."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli import console
from landmark_cli.attention.cache import Offload, Positions, Selection
from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.chunk_lengths import default_chunk
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models import register
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.options import settings_of
from tests.closeness import assert_close_norm, relative_error

register()
FREQ, VOCABULARY, LANDMARK = 4, 40, 39


def tiny_model(seed: int = 0, **more) -> GPTForCausalLM:
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=VOCABULARY,
        n_layer=2,
        n_head=2,
        n_embd=16,
        landmark_freq=FREQ,
        landmark_token_id=LANDMARK,
        trained_length=40,
        top_k_blocks=2,
        initializer_range=0.5,
        eos_token_id=None,
        **more,
    )
    return GPTForCausalLM(config).eval()


MODEL, JOINT_MODEL = tiny_model(), tiny_model(landmark_softmax="joint")


def text(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, LANDMARK, (length,), generator=torch.Generator().manual_seed(seed))


def read_all(rows, model=MODEL, **options) -> list[torch.Tensor]:
    """Logits of every text token of each row."""
    parts = [[] for _ in rows]
    for chunk in BlockReader(model, batch=len(rows), **options).read(rows):
        for row, length in enumerate(chunk.lengths):
            parts[row].append(chunk.logits[row, chunk.logits.shape[1] - length :])
    return [torch.cat(part) for part in parts]


def full_forward(row: torch.Tensor, model=MODEL) -> torch.Tensor:
    stream = insert_landmarks(row, FREQ, LANDMARK)
    with torch.no_grad():
        logits = model(stream[None]).logits[0]
    return logits[~landmark_positions(len(stream), FREQ + 1)]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from(get_args(Selection)),
    st.sampled_from([None, 3]),
    st.integers(3, 20),
)
@settings(max_examples=25, deadline=None)
def test_a_batch_gives_what_its_rows_give_alone(lengths, top_k, selection, cache_blocks, chunk):
    rows = [text(length, seed) for seed, length in enumerate(lengths)]
    options = {"top_k_blocks": top_k, "selection": selection, "cache_blocks": cache_blocks, "chunk": chunk}
    together = read_all(rows, **options)
    for row, logits in zip(rows, together, strict=True):
        assert_close_norm(logits, read_all([row], **options)[0])


@given(st.integers(2, 50), st.integers(1, 30), st.sampled_from([MODEL, JOINT_MODEL]))
@settings(max_examples=25, deadline=None)
def test_with_all_blocks_retrieved_any_split_equals_one_forward(length, chunk, model):
    row = text(length)
    read = read_all([row], model, top_k_blocks=64, chunk=chunk, positions="absolute")[0]
    assert_close_norm(read, full_forward(row, model))
    # All blocks are near ones then, so the bounded placement is the true one too.
    read = read_all([row], model, top_k_blocks=64, chunk=chunk)[0]
    assert_close_norm(read, full_forward(row, model))


def test_steps_equal_reading_token_by_token():
    rows = [text(23, 1), text(9, 2)]
    expected = read_all(rows, top_k_blocks=2, chunk=1)
    reader = BlockReader(MODEL, top_k_blocks=2, batch=2)
    for at in range(23):
        logits = reader.step([rows[0][at].item(), rows[1][at].item() if at < 9 else None])
        assert_close_norm(logits[0], expected[0][at])
        if at < 9:
            assert_close_norm(logits[1], expected[1][at])


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 20),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.sampled_from(get_args(Positions)),
)
@settings(max_examples=20, deadline=None)
def test_reranked_and_sharpened_a_batch_gives_what_its_rows_give_alone_and_step_by_step(
    lengths, top_k, proposed, temperature, positions
):
    rows = [text(length, seed) for seed, length in enumerate(lengths)]
    options = {"top_k_blocks": top_k, "rerank_blocks": proposed, "block_temperature": temperature}
    options["positions"] = positions
    together = read_all(rows, JOINT_MODEL, chunk=7, **options)
    for row, logits in zip(rows, together, strict=True):
        assert_close_norm(logits, read_all([row], JOINT_MODEL, chunk=7, **options)[0])
    reader, expected = BlockReader(JOINT_MODEL, **options), read_all(rows[:1], JOINT_MODEL, chunk=1, **options)[0]
    for token, logits in zip(rows[0].tolist(), expected, strict=True):
        assert_close_norm(reader.step([token])[0], logits)


def test_reranking_and_sharpening_matter():
    row = text(60)
    given = {"model": JOINT_MODEL, "top_k_blocks": 2, "chunk": 8}
    base = read_all([row], **given)[0]
    assert relative_error(base, read_all([row], **given, rerank_blocks=5)[0]) > 1e-2
    assert relative_error(base, read_all([row], **given, block_temperature=0.2)[0]) > 1e-3
    assert torch.equal(base, read_all([row], **given, rerank_blocks=2, block_temperature=1.0)[0])


@pytest.mark.parametrize("top_k", [0, 5])
def test_what_is_no_more_than_is_read_is_told_once_and_changes_nothing(top_k, capsys, monkeypatch):
    monkeypatch.setattr(console, "_warned", set())
    for _ in range(2):
        assert BlockReader(JOINT_MODEL, top_k_blocks=top_k, rerank_blocks=4).cache.settings.rerank_blocks is None
    assert capsys.readouterr().err.count("--rerank-blocks 4 changes nothing") == 1


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 21])
def test_last_only_gives_the_last_text_token(length):
    row = text(length)
    *_, last = BlockReader(MODEL, top_k_blocks=2, chunk=5).read([row], last_only=True)
    assert last.logits.shape == (1, 1, VOCABULARY)
    assert_close_norm(last.logits[0, 0], read_all([row], top_k_blocks=2, chunk=5)[0][-1])


def test_retrieval_matters_and_eviction_forgets():
    row = text(60)
    base = read_all([row], top_k_blocks=2, chunk=8)[0]
    assert relative_error(base, read_all([row], top_k_blocks=0, chunk=8)[0]) > 1e-2
    assert relative_error(base, read_all([row], top_k_blocks=2, chunk=8, cache_blocks=2)[0]) > 1e-2
    assert_close_norm(
        read_all([row], top_k_blocks=0, chunk=8)[0], read_all([row], top_k_blocks=2, chunk=8, cache_blocks=0)[0]
    )


def test_reset_forgets():
    reader = BlockReader(MODEL, top_k_blocks=2, chunk=8)
    first = [chunk.logits for chunk in reader.read([text(30)])]
    reader.reset()
    again = [chunk.logits for chunk in reader.read([text(30)])]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_options_have_the_words_of_the_cache():
    """Written twice, because options must not import torch."""
    options = settings_of(ReadingSettings)
    assert options["selection"].choices == get_args(Selection) and options["positions"].choices == get_args(Positions)


def test_default_chunk_fills_the_trained_length():
    assert default_chunk(512, 4, 50) == 250
    assert default_chunk(512, 2, 50) == 350


def test_errors():
    with pytest.raises(LandmarkError, match="leaves no room"):
        default_chunk(512, 9, 50)
    with pytest.raises(LandmarkError, match="landmark token"):
        next(BlockReader(MODEL).read([torch.tensor([1, LANDMARK])]))
    with pytest.raises(LandmarkError, match="at least 1"):
        BlockReader(MODEL, chunk=0)
    with pytest.raises(LandmarkError, match='--rerank-blocks 9 asks .* landmark_softmax is "grouped"'):
        BlockReader(MODEL, rerank_blocks=9)
    with pytest.raises(LandmarkError, match="--rerank-blocks 9 .* --selection max_over_heads is shared"):
        BlockReader(JOINT_MODEL, rerank_blocks=9, selection="max_over_heads")
    baseline = GPTForCausalLM(GPTConfig(vocab_size=8, n_layer=1, n_head=1, n_embd=8, landmark_freq=None))
    with pytest.raises(LandmarkError, match="no landmarks"):
        BlockReader(baseline)


@pytest.mark.parametrize("top_k_blocks", [0, 2])
def test_memory_for_blocks_may_hold_anything_before_they_are_read(top_k_blocks, monkeypatch):
    """Host memory is taken as it is found. Rows of unequal length have fewer blocks than are retrieved, and padding."""
    rows = [text(37), text(14), text(3)]

    def logits(offload: str) -> list[torch.Tensor]:
        reader = BlockReader(tiny_model(), top_k_blocks=top_k_blocks, chunk=8, offload=offload, batch=3)
        parts = list(reader.read(rows))
        read = [torch.cat([part.row(row) for part in parts]) for row in range(3)]
        return [*read, *(reader.step([5, 6, None])[:2] for _ in range(5))]

    expected = logits("none")
    empty = Offload.empty
    monkeypatch.setattr(Offload, "empty", lambda *arguments: empty(*arguments).fill_(torch.nan))
    for one, other in zip(logits("cpu"), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_rows_that_have_ended_are_no_work(last_only, offload, monkeypatch):
    """Nor are those that had nothing to read, wherever they stand; what is read is what each row gives alone."""
    model, called = tiny_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *given, **named: called.append(len(named["input_ids"])) or forward(*given, **named)
    )
    texts = [text(n, seed) for seed, n in enumerate((9, 0, 30, 21, 8))]
    together = BlockReader(model, batch=5, chunk=8, offload=offload)
    parts = list(together.read(texts, last_only=last_only))
    assert called == [4, 3, 2, 1]
    for row, own in enumerate(texts):
        alone = BlockReader(model, chunk=8)
        of_row = [part for part in parts if part.lengths[row]]
        for part, expected in zip(of_row, alone.read([own], last_only=last_only), strict=True):
            found = part.logits[row, -1:] if last_only else part.row(row)
            assert_close_norm(found, expected.logits[0])
        tokens = [7 if other == row else None for other in range(5)]
        assert_close_norm(together.step(tokens)[row], alone.step([7])[0])


def test_rows_are_rounded_up_where_graphs_are_recorded(monkeypatch):
    reader = BlockReader(tiny_model(), batch=26, chunk=8)

    def at_work(count: int) -> list[int]:
        """Of rows every third of which has text, so many in all."""
        return reader._rows_at_work([torch.tensor([1] * (row % 3 == 0 and row < 3 * count)) for row in range(26)])

    assert at_work(9) == list(range(0, 26, 3))
    monkeypatch.setattr(reader.forward, "recording", True)
    assert at_work(9) == sorted([*range(0, 26, 3), 1])
    assert at_work(8) == list(range(0, 24, 3)) and at_work(1) == [0]
    # Where as many are too much work for a graph, none rests in vain.
    with monkeypatch.context() as patched:
        patched.setattr(reader.forward, "records", lambda rows, width: rows <= 9)
        assert at_work(9) == list(range(0, 26, 3))
    reader.trace()
    assert at_work(9) == list(range(26))
