"""Several memories one after another, and the beginning of one: as of a reader that read just that."""

import pytest
import torch

from landmark_cli.errors import UsageError
from landmark_cli.inference import reader_memory
from landmark_cli.inference.memory_parts import beginning
from tests.inference.remembering import NOVEL, ask, read, reader, recalled
from tests.tiny import tiny_text

# --- a library


@pytest.fixture
def books(tmp_path):
    """Paths by name: "b" has 6 blocks and 3 tokens, "c" 5 blocks, "b6" is the first 6 blocks of "b"."""
    texts = {"b": tiny_text(27, seed=7), "c": tiny_text(20, seed=8)}
    for name, text in {**texts, "b6": texts["b"][:24]}.items():
        for bound in (None, 5):
            one = reader(cache_blocks=bound)
            read(one, text)
            one.save(tmp_path / f"{name}-{bound}")
    return lambda bound, *names: [tmp_path / f"{name}-{bound}" for name in names]


def test_a_library_has_the_blocks_of_its_files_one_after_another(books):
    both = recalled(books(None, "b", "c"))
    assert (both.cache.host_blocks, both.cache.host_tail) == ([11], [0])
    first, second = (recalled(books(None, name)).cache.copy_of(0) for name in ("b", "c"))
    for together, one, two in zip(both.cache.copy_of(0), first, second, strict=True):
        for held, before, after in zip(together, one, two, strict=True):
            assert torch.equal(held, torch.cat([before[:, :6], after], dim=1))
    assert list(both.texts[0]) == [*tiny_text(27, seed=7)[:24].tolist(), *tiny_text(20, seed=8).tolist()]
    assert not torch.equal(ask(both), ask(recalled(books(None, "c", "b"))))


def test_the_incomplete_block_of_an_earlier_file_is_left_out(books):
    assert torch.equal(ask(recalled(books(None, "b", "c"))), ask(recalled(books(None, "b6", "c"))))
    assert recalled(books(None, "c", "b")).cache.host_tail == [3]


@pytest.mark.parametrize("settings", [{}, {"cache_blocks": 3}], ids=str)
@pytest.mark.parametrize("order", ["sb", "ssb", "bs", "bsb", "ss"])
def test_texts_shorter_than_a_block_are_part_of_a_library_too(tmp_path, settings, order):
    """They have no complete block, so in front of others nothing of them is left."""
    for name, text in {"s": NOVEL[:3], "b": NOVEL}.items():
        one = reader(**settings)
        read(one, text)
        one.save(tmp_path / name)
    left = [name for name in order[:-1] if name == "b"] + [order[-1]]
    found, expected = (recalled([tmp_path / name for name in names], **settings) for names in (order, left))
    assert torch.equal(ask(found), ask(expected)) and found.texts == expected.texts


def test_a_library_keeps_no_more_than_the_cache_does(books):
    """The last file fills it, so what came before is evicted; the placement of the nearest blocks is the same."""
    bounded = recalled(books(5, "b", "c"), cache_blocks=5)
    assert torch.equal(ask(bounded), ask(recalled(books(5, "c"), cache_blocks=5)))
    assert bounded.cache.host_blocks[0] > 11


def test_no_library_of_absolute_positions(tmp_path):
    one = reader(positions="absolute")
    read(one, NOVEL)
    one.save(tmp_path / "a")
    with pytest.raises(UsageError, match="absolute positions cannot be read one after another"):
        recalled([tmp_path / "a"] * 2, positions="absolute")


def test_a_library_that_is_asked_again_answers_as_at_first(books):
    paths = books(None, "b", "c")
    both = recalled(paths)
    first = ask(both)
    for order in (paths, paths[::-1], paths):
        both.recall(*order)
        assert torch.equal(ask(both), first if order == paths else ask(recalled(order)))


# --- a beginning


def memory_of(text, **settings):
    one = reader(**settings)
    read(one, text)
    return reader_memory.take(one)


@pytest.mark.parametrize("chunk", [8, 7])
@pytest.mark.parametrize(
    "settings", [{}, {"positions": "absolute"}, {"selection": "max_over_tokens"}, {"cache_blocks": 20}], ids=str
)
def test_the_beginning_of_a_memory_is_that_of_the_texts_beginning(chunk, settings):
    settings = {**settings, "chunk": chunk}
    for tokens in (chunk, 3 * chunk, 6 * chunk, 53):
        found = beginning(memory_of(NOVEL, **settings), tokens)
        assert found.text.tolist() == NOVEL[:tokens].tolist()
        later, expected = reader(**settings), reader(**settings)
        read(expected, NOVEL[:tokens])
        reader_memory.give(later, [found])
        assert torch.equal(ask(later), ask(expected))


def test_no_beginning_where_it_would_not_be_that_of_the_text():
    evicting = memory_of(NOVEL, cache_blocks=3)
    assert beginning(evicting, 32) is None and beginning(evicting, 53) is evicting
    assert beginning(memory_of(NOVEL[:12], cache_blocks=3), 8).blocks == 2
