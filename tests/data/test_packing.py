"""Documents in windows: whole ones, and masked ones whose landmarks count from their beginnings; against loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data import packing
from landmark_cli.data.batches import Batches, SequentialWindows
from landmark_cli.data.landmarks import IGNORED_TARGET, insert_landmarks, next_token_targets
from landmark_cli.data.packing import Place, document_ends, whole_documents
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.training_data import TrainingData
from landmark_cli.data.windows import AnswerWeights, Windows
from landmark_cli.errors import LandmarkError
from landmark_cli.models.gpt import GPTConfig
from tests.data.test_batches import EOT, LANDMARK, Numbers


def documents_file(path, lengths, marks=False):
    """A token file of documents of so many text tokens, which count up from 0; every third is of an answer."""
    first = 0
    with TokenFileWriter(path, Numbers, source="numbers", answers=marks) as writer:
        for length in lengths:
            ids = np.arange(first, first + length)
            writer.add_document(ids, marks=(ids % 3 == 0).astype(np.uint8) if marks else None)
            first += length
    return TokenFile.open(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    lengths = [3, 1, 0, 8, 40, 2, 7, 7, 7, 15, 1, 1, 1, 90, 4, 12]
    return documents_file(tmp_path_factory.mktemp("documents") / "train.bin", lengths, marks=True)


def texts_of(file):
    """The documents of a file, each with its end of text."""
    return [part.tolist() for part in np.split(file.tokens, document_ends(file)[:-1])]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20), length=st.integers(1, 25))
@settings(max_examples=30, deadline=None)
def test_whole_windows_hold_every_token_once_and_cut_only_what_is_too_long(tmp_path_factory, lengths, length):
    file = documents_file(tmp_path_factory.mktemp("some") / "train.bin", lengths)
    windows = whole_documents(file, length)
    starts, ends = windows[:, 0], windows.sum(1)
    assert starts[0] == 0 and ends[-1] == len(file.tokens) and (starts[1:] == ends[:-1]).all()
    assert (windows[:, 1] >= 1).all() and (windows[:, 1] <= length).all()
    edges = [0, *document_ends(file)]
    for begin, end in zip(edges, edges[1:], strict=False):
        cuts = ((starts > begin) & (starts < end)).sum()
        # One that is too long begins in a window of its own, or behind what is left of the one before.
        assert cuts == 0 if end - begin <= length else cuts == -(-(end - begin) // length) - 1


def test_ends_are_found_across_pieces(file, monkeypatch):
    whole = document_ends(file)
    monkeypatch.setattr(packing, "PIECE", 7)
    assert np.array_equal(document_ends(file), whole) and len(whole) == file.metadata.documents


@pytest.mark.parametrize("include_landmarks", [False, True], ids=["text", "landmarks too"])
@pytest.mark.parametrize(("length", "freq"), [(20, None), (20, 4), (19, 4), (21, 4), (2, 1), (60, 7)])
def test_one_way_to_cut_gives_what_the_other_does_where_windows_are_full(file, length, freq, include_landmarks):
    if freq is None and include_landmarks:
        return
    windows = Windows(length, freq, LANDMARK, EOT, include_landmarks)
    text = windows.text_length
    places = [Place(file, start, text) for start in range(0, len(file.tokens) - text - 1, 5)]
    usual, found = windows.cut(places), windows._cut_documents(places)
    assert usual.keys() == found.keys()
    for name in usual:
        assert torch.equal(usual[name], found[name]) and usual[name].dtype == found[name].dtype


@pytest.mark.parametrize("include_landmarks", [False, True], ids=["text", "landmarks too"])
@pytest.mark.parametrize("pack", ["cut", "whole"])
@pytest.mark.parametrize(("length", "freq"), [(21, 4), (20, 4), (60, 7), (64, 3)])
def test_masked_documents_are_streams_of_their_own(file, length, freq, pack, include_landmarks):
    windows = Windows(length, freq, LANDMARK, EOT, include_landmarks, mask_documents=True, pack=pack)
    sequential = SequentialWindows(file, windows)
    batch = sequential.batch(0, len(sequential))
    ids, labels, bounds = batch["input_ids"], batch["labels"], batch["cu_seqlens"].tolist()
    documents = sorted(set(bounds))
    assert ids.shape == labels.shape == (len(sequential), length) and ids.dtype == labels.dtype == torch.int64
    assert bounds[0] == 0 and bounds[-1] == ids.numel() and sorted(bounds) == bounds
    assert set(range(0, ids.numel(), length)) <= set(bounds)
    assert (len(bounds) - 1).bit_count() == 1

    texts, begin = [], 0
    for document in texts_of(file):
        texts += [(begin + i, token) for i, token in enumerate(document)]
        begin += len(document)
    following = dict(texts)
    read = 0
    for row in range(len(ids)):
        edges = [edge - row * length for edge in documents if row * length <= edge <= (row + 1) * length]
        for first, last in zip(edges, edges[1:], strict=False):
            stream = ids[row, first:last].tolist()
            if (labels[row, first:last] == IGNORED_TARGET).all() and set(stream) == {EOT} and last == length:
                continue
            text = [token for token in stream if token != LANDMARK]
            assert text == [following[read + i] for i in range(len(text))]
            assert EOT not in text[:-1]
            whole = insert_landmarks(torch.tensor(text), freq, LANDMARK)
            assert stream == whole[: len(stream)].tolist() and len(whole) - len(stream) in (0, int(last == length))
            after = following.get(read + len(text), EOT)
            longer = insert_landmarks(torch.tensor([*text, after]), freq, LANDMARK)
            expected = next_token_targets(
                torch.tensor([*longer.tolist(), after]),
                landmark_token_id=LANDMARK,
                eot_id=EOT,
                include_landmarks=include_landmarks,
            )
            assert labels[row, first:last].tolist() == expected[: len(stream)].tolist()
            read += len(text)
    assert read == (len(file.tokens) if pack == "whole" else len(ids) * windows.text_length)


@pytest.mark.parametrize("include_landmarks", [False, True], ids=["text", "landmarks too"])
@pytest.mark.parametrize("pack", ["cut", "whole"])
def test_weights_are_those_of_each_positions_target(file, pack, include_landmarks):
    windows = Windows(31, 4, LANDMARK, EOT, include_landmarks, mask_documents=True, pack=pack)
    batch = Batches([file], None, windows, 9, 0, AnswerWeights(5.0)).batch(2, 0, 9)
    labels, weights = batch["labels"], batch["weights"]
    # The end of text behind an answer is of the answer.
    known = (labels != IGNORED_TARGET) & (labels != EOT)
    expected = torch.where((labels % 3 == 0) & (labels != LANDMARK), 5.0, 1.0)
    assert torch.equal(weights[known], expected[known]) and (weights[labels == IGNORED_TARGET] == 0).all()
    assert (weights[known] == 5).any() and (weights[known] == 1).any()


@pytest.mark.parametrize("mask", [False, True], ids=["seen", "masked"])
@pytest.mark.parametrize("pack", ["cut", "whole"])
@pytest.mark.parametrize("begin", [(700,), (700, 701), (EOT,)], ids=["one", "two", "what ends a text"])
def test_windows_begin_with_what_begins_a_text_and_are_the_same_otherwise(file, begin, pack, mask):
    settings = {"mask_documents": mask, "pack": pack}
    plain, begun = (Windows(41, 7, LANDMARK, EOT, **settings, **more) for more in ({}, {"begin": begin}))
    sequential = [SequentialWindows(file, windows) for windows in (plain, begun)]
    usual, found = (windows.batch(0, len(windows)) for windows in sequential)
    starts = usual["cu_seqlens"].unique()[:-1] if mask else torch.arange(0, usual["input_ids"].numel(), 41)
    assert len(starts) > len(sequential[0]) if mask else len(starts) == len(sequential[0])
    expected = usual["input_ids"].flatten().clone()
    for offset, token in enumerate(begin):
        places = starts + offset
        # A document of an end of text alone has no room for more.
        reached = [
            start for start in starts.tolist() if EOT not in usual["input_ids"].flatten()[start : start + offset + 1]
        ]
        expected[torch.tensor(reached) + offset] = token
        assert len(reached) > len(places) // 2
    assert torch.equal(found["input_ids"].flatten(), expected)
    changed = usual["labels"] != found["labels"]
    # Of several such tokens the later ones are predicted, and behind one that ends a text nothing is.
    others = {(700,): set(), (700, 701): {701}, (EOT,): {IGNORED_TARGET}}[begin]
    assert set(found["labels"][changed].tolist()) == others
    assert all(torch.equal(usual[name], found[name]) for name in usual.keys() - {"input_ids", "labels"})


@pytest.mark.parametrize("mask", [False, True], ids=["seen", "masked"])
def test_whole_windows_are_drawn_in_another_order_each_epoch_and_anew_the_same(file, mask):
    def drawn(step):
        windows = Windows(41, 4, LANDMARK, EOT, mask_documents=mask, pack="whole")
        return Batches([file], None, windows, windows_in_all, 3).batch(step, 0, windows_in_all)

    windows_in_all = len(whole_documents(file, Windows(41, 4, LANDMARK, EOT).text_length))
    first, second = drawn(0), drawn(1)
    windows = Windows(41, 4, LANDMARK, EOT, mask_documents=mask, pack="whole")
    filled = len(file.tokens) / (windows_in_all * windows.text_length)
    assert Batches([file], None, windows, 1, 3).filled == pytest.approx(filled) and 0.5 < filled < 1
    for batch in (first, second):
        text = batch["input_ids"][(batch["input_ids"] < EOT)]
        assert sorted(text.tolist()) == sorted(token for token in file.tokens.tolist() if token != EOT)
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert all(torch.equal(drawn(0)[name], first[name]) for name in first)


def test_a_corpus_of_one_document_has_nothing_to_mask(tmp_path):
    for split in ("train", "validation"):
        documents_file(tmp_path / f"{split}.bin", [200])
    data = TrainingData.open([tmp_path])
    config = GPTConfig(trained_length=33, landmark_freq=4, landmark_token_id=600, n_layer=1, n_head=1, n_embd=2)
    with pytest.raises(LandmarkError, match=r"--mask-documents: .*train.bin has no ends of documents"):
        data.windows(config, mask_documents=True)
    assert data.windows(config, pack="whole", sequence_length=50).text_length == 40
