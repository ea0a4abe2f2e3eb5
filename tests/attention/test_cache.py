"""The block cache: rings that grow, room made in one go, traces, blocks in host memory, settings that cannot be."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from landmark_cli.attention.cache import BlockCache, Offload, RetrievalSettings, Selection, pages
from landmark_cli.attention.cache.layer_window import rolled
from landmark_cli.attention.cache.pages import Pages, require_host_memory
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from tests.attention.reading import LEAVING_OUT, Case, read
from tests.closeness import assert_close_norm
from tests.tiny import tiny_model, tiny_text

DIM = 4


def attend(cache: BlockCache, lengths, generator) -> torch.Tensor:
    chunk = cache.begin_chunk(lengths)
    q, k, v = (torch.randn(cache.batch, 1, chunk.width, DIM, generator=generator) for _ in range(3))
    out = attend_chunk(0, q, k, v, cache, chunk, backend="eager")
    cache.end_chunk(chunk)
    return out


def make(top_k: int = 2, batch: int = 1, **settings) -> BlockCache:
    return BlockCache(RetrievalSettings(3, top_k, **settings), default_inverse_frequencies(DIM), batch=batch)


@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=12), st.sampled_from([1, 2, 5]))
def test_what_a_ring_holds_does_not_depend_on_how_it_grew(lengths, bound):
    lengths = [pair for pair in lengths if max(pair)]
    grown, roomy = (make(batch=2, cache_blocks=bound) for _ in range(2))
    roomy.layer(0, torch.zeros(2, 1, 1, DIM), roomy.begin_chunk([40, 40]))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for pair in lengths:
        assert_close_norm(attend(grown, pair, generators[0]), attend(roomy, pair, generators[1]))


def test_room_is_doubled_or_made_at_once():
    cache, generator = make(), torch.Generator().manual_seed(0)
    attend(cache, [3], generator)
    assert cache.layers[0].capacity == 16
    attend(cache, [60], generator)
    assert (cache.layers[0].capacity, cache.generation > 0) == (32, True)
    before = cache.generation
    cache.expect(300)
    attend(cache, [60], generator)
    assert (cache.layers[0].capacity, cache.generation) == (101, before + 1)
    attend(cache, [60], generator)
    assert cache.generation == before + 1


def test_a_table_of_rotations_replaces_one_that_is_too_short_alone():
    """Graphs that were recorded before another is first used stay right."""
    cache, cpu = make(), torch.device("cpu")
    short = cache.rotations.table(5, cpu)
    cache.rotations.table(5, cpu, torch.float16)
    assert cache.rotations.table(8, cpu) is short and cache.generation == 0
    assert len(cache.rotations.table(9, cpu)[0]) == 16 and cache.generation == 1


def test_a_bounded_cache_has_room_for_its_bound_and_a_chunk():
    cache, generator = make(cache_blocks=4), torch.Generator().manual_seed(0)
    for _ in range(12):
        attend(cache, [9], generator)
    assert cache.layers[0].capacity == 8


def test_reset_forgets_and_keeps_the_memory():
    cache = make()
    first = [attend(cache, [7], torch.Generator().manual_seed(0)), attend(cache, [5], torch.Generator().manual_seed(1))]
    memory = cache.layers[0].blocks.data_ptr()
    cache.reset()
    again = [attend(cache, [7], torch.Generator().manual_seed(0)), attend(cache, [5], torch.Generator().manual_seed(1))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert cache.layers[0].blocks.data_ptr() == memory


@pytest.mark.parametrize("name", LEAVING_OUT)
def test_rows_that_rest_can_be_left_out(name):
    expected, found, caches = read(LEAVING_OUT[name], backend="eager", poison=True)
    assert_close_norm(found, expected)
    assert caches[0].host_blocks == caches[1].host_blocks and caches[0].host_tail == caches[1].host_tail
    for row in range(3):
        for one, other in zip(caches[0].copy_of(row)[0], caches[1].copy_of(row)[0], strict=True):
            assert_close_norm(other, one)


def test_rows_that_are_left_out_have_no_tokens():
    cache = make(batch=3)
    with pytest.raises(ValueError, match=r"lengths \[1, 2, 0\] give tokens to rows that are not among \[1, 2\]"):
        cache.begin_chunk([1, 2, 0], rows=[1, 2])


@pytest.mark.parametrize("selection", get_args(Selection))
def test_a_trace_names_the_blocks_and_their_shares(selection):
    case = Case([24, 4], heads=2, block_size=4, top_k=3, settings={"selection": selection})
    cache = read(case)[2][0]
    entries = cache.trace.read_by(0, -1)
    assert [entry["head"] for entry in entries] == [0] * 3 + [1] * 3
    for head in range(2):
        blocks = [entry["block"] for entry in entries if entry["head"] == head]
        assert blocks == sorted(set(blocks)) and set(blocks) <= set(range(6))
        assert 0 < sum(entry["share"] for entry in entries if entry["head"] == head) < 1
    assert {entry["layer"] for entry in entries} == {0}


@given(st.integers(1, 6), st.lists(st.sets(st.integers(0, 11), max_size=8), max_size=25))
def test_the_least_recently_used_pages_make_room(frames, calls):
    count_of_pages = 12
    resident = Pages((1, 2, 6, 2, 1, 1), torch.zeros(frames * 2))
    assert (resident.frames, resident.pages) == (frames, count_of_pages)
    held: dict[int, int] = {}
    for now, call in enumerate(calls, 1):
        needed = torch.zeros(count_of_pages, dtype=torch.bool)
        needed[list(call)] = True
        arriving, frames_given, count = resident.admit(needed)
        copied = dict(zip(arriving[:count].tolist(), frames_given[:count].tolist(), strict=True))
        missing = call - held.keys()
        stay = {page: used for page, used in held.items() if page not in call}
        assert copied.keys() <= missing
        # As many as fit beside those that are needed and here; the oldest of the others leave.
        assert len(copied) == min(len(missing), frames - len(call & held.keys()))
        held.update(dict.fromkeys(call & held.keys(), now))
        leaving = max(0, len(held) + len(copied) - frames)
        oldest = sorted(stay.values())[:leaving]
        held.update(dict.fromkeys(copied, now))
        in_pool = {page for page in range(count_of_pages) if resident.page_table[page] >= 0}
        left = held.keys() - in_pool
        assert sorted(stay[page] for page in left) == oldest
        held = {page: used for page, used in held.items() if page in in_pool}
        assert in_pool == held.keys()
        assert len({int(resident.page_table[page]) for page in in_pool}) == len(in_pool)


def test_blocks_in_host_memory_change_nothing():
    model, rows = tiny_model(), [tiny_text(37)]
    plain, offloaded = (BlockReader(model, top_k_blocks=2, chunk=8, offload=where) for where in ("none", "cpu"))
    for a, b in zip(plain.read(rows), offloaded.read(rows), strict=True):
        assert torch.equal(a.logits, b.logits)


@pytest.mark.parametrize("resident", [None, 3], ids=["here", "offloaded"])
@pytest.mark.parametrize("backend", ["eager", "blockwise", "triton"])
def test_blocks_that_lie_elsewhere_are_fetched_before_they_are_read(backend, resident):
    """Memory that nothing has been fetched to is poisoned. Chunks and steps, at first and later."""

    def outputs(source):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator)

        held = [(random(1, 30, 2, 5, 16), random(1, 30, 16))]
        offload = None if resident is None else Offload(1, resident * 2 * 5 * 16 * 4)
        cache = BlockCache(RetrievalSettings(5, 2), default_inverse_frequencies(16), batch=2, offload=offload)
        found = []
        for step, lengths in enumerate(([7, 4], [1, 1], [6, 1], [1, 0])):
            if step in (0, 2):
                cache.put(step // 2, [(source(*held[0]) if source else held[0][0], held[0][1])], 29, 3)
            q, k, v = random(2, 2, max(lengths), 16), *random(2, 2, 1, max(lengths), 16)
            chunk = cache.begin_chunk(lengths)
            blocks = cache.layer(0, k, chunk)
            if source and step in (0, 2):
                blocks.blocks[blocks._absent.mask] = torch.nan
            assert blocks.fetching == bool(source)
            found.append(attend_chunk(0, q, k, v, cache, chunk, backend=backend))
            cache.end_chunk(chunk)
        return found, cache

    class Elsewhere:
        def __init__(self, blocks, _):
            self.blocks, self.shape, self.nbytes = blocks, blocks.shape, blocks.nbytes

        def read(self, heads, blocks, device):
            return self.blocks[heads, blocks]

        def whole(self):
            return self.blocks

    plain, fetched = outputs(None), outputs(Elsewhere)
    for one, other in zip(plain[0], fetched[0], strict=True):
        torch.testing.assert_close(one, other)
    assert 0 < fetched[1].layers[0]._absent.mask.sum() < 29 * 2
    fetched[1].fetch_all()
    assert not fetched[1].fetching


def test_too_little_host_memory_is_said_before(monkeypatch):
    monkeypatch.setattr(pages, "available_host_memory", lambda: 2**20)
    reader = BlockReader(tiny_model(), top_k_blocks=2, offload="cpu")
    reader.expect(100)
    with pytest.raises(LandmarkError, match=r"offloading 125,000,001 tokens needs .* GiB of host memory, 0.0 GiB are"):
        reader.expect(100_000_000)
    monkeypatch.setattr(pages, "available_host_memory", lambda: None)
    require_host_memory(10**9, 12, 10**15)


def test_settings_and_lengths_that_cannot_be():
    for settings, match in (
        ({"block_size": 1, "top_k": 1}, "block_size is 1"),
        ({"block_size": 4, "top_k": -1}, "top_k is -1"),
        ({"block_size": 4, "top_k": 1, "selection": "best"}, "selection is 'best'"),
        ({"block_size": 4, "top_k": 1, "positions": "far"}, "positions is 'far'"),
        ({"block_size": 4, "top_k": 1, "cache_blocks": -1}, "cache_blocks is -1"),
    ):
        with pytest.raises(ValueError, match=match):
            RetrievalSettings(**settings)
    cache = make(batch=2)
    for lengths in ([3], [3, 4, 5], [-1, 2]):
        with pytest.raises(ValueError, match="do not fit a chunk of 2 rows"):
            cache.begin_chunk(lengths)
    with pytest.raises(ValueError, match="do not fit"):
        cache.begin_chunk([3, 5], width=4)


def test_recorded_steps_keep_the_address_of_their_counts():
    cache = BlockCache(RetrievalSettings(4, 2), default_inverse_frequencies(16))
    blocks = cache.layer(0, torch.zeros(1, 1, 4, 16), cache.begin_chunk([4]))
    first = blocks.arrivals(8)
    assert blocks.arrivals(8).data_ptr() == first.data_ptr()
    with pytest.raises(ValueError, match="rows is 16, was 8"):
        blocks.arrivals(16)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("tokens", "length"), [(1, 0), (1, 4), (12, 5), (12, 12), (7, 30)])
def test_what_rolls_on_is_the_newest_text(tokens, length, share):
    text = torch.rand(3, tokens, generator=torch.Generator().manual_seed(tokens)) < share
    for found, row in zip(rolled(text, length), text.tolist(), strict=True):
        all_of_it = [*range(length), *(length + token for token, is_text in enumerate(row) if is_text)]
        assert found.tolist() == all_of_it[len(all_of_it) - length :]
