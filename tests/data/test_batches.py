"""Batches: pure functions of (seed, step, row) that read every window once an epoch."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data.batches import Batches, SequentialWindows, iterate, permuted
from landmark_cli.data.landmarks import IGNORED_TARGET, insert_landmarks, landmark_positions, remove_landmarks
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.windows import Windows
from landmark_cli.errors import LandmarkError

LANDMARK, EOT = 90_000, 89_999


class Numbers:
    """A tokenizer for documents that are numbers."""

    name = "numbers"
    vocab_size = 90_000
    eot_id = EOT
    fingerprint = ""


def token_file(path, first, count, document=10_000):
    """Tokens first, first + 1, ...: a token tells where it stands. `document` tokens a document."""
    with TokenFileWriter(path, Numbers, source="numbers") as writer:
        for start in range(first, first + count, document):
            writer.add_document(np.arange(start, min(start + document, first + count)))
    return TokenFile.open(path)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("numbers") / "train.bin", 0, 1003)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("others") / "train.bin", 5000, 500)


def batches_of(*files, weights=None, length=16, freq=4, batch=6, seed=1, **more):
    return Batches(files, weights, Windows(length, freq, LANDMARK, EOT, **more), batch, seed)


@given(st.integers(1, 500), st.integers(0, 2**64 - 1))
def test_permutation_is_one(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutation_shuffles():
    order = np.array([permuted(i, 10_000, 7) for i in range(10_000)])
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert not np.array_equal(order, [permuted(i, 10_000, 8) for i in range(10_000)])


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 3), st.integers(0, 2**40))
def test_rows_hold_consecutive_text_with_landmarks(numbers, freq, extra, seed, step):
    length = freq + 1 + extra
    batches = batches_of(numbers, length=length, freq=freq, seed=seed)
    batch = batches.batch(step, 0, 6)
    assert {name: (t.shape, t.dtype) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "labels"), ((6, length), torch.int64)
    )
    assert torch.equal(batch["input_ids"][0] == LANDMARK, landmark_positions(length, freq + 1))
    text = remove_landmarks(batch["input_ids"], freq + 1)
    targets = remove_landmarks(batch["labels"], freq + 1)
    assert torch.equal(text, text[:, :1] + torch.arange(text.shape[1]))
    # The last window may reach the end-of-text token after the 1003 numbers.
    assert torch.equal(targets[text < 1002], text[text < 1002] + 1)
    assert (targets[text == 1002] == EOT).all()
    assert (batch["labels"][batch["input_ids"] == LANDMARK] == IGNORED_TARGET).all()


def test_landmarks_as_targets(numbers):
    for length in (14, 15, 16):
        batch = batches_of(numbers, length=length, include_landmarks=True).batch(0, 0, 6)
        ids, labels = batch["input_ids"], batch["labels"]
        assert torch.equal(labels[:, :-1], ids[:, 1:])
        text = ids[:, :1] + torch.arange(length)
        assert torch.equal(labels[:, -1], insert_landmarks(text, 4, LANDMARK)[:, length])


def test_plain_text_for_baselines(numbers):
    batch = batches_of(numbers, freq=None).batch(3, 0, 6)
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)


def test_positions_with_end_of_text_predict_nothing(tmp_path):
    short = token_file(tmp_path / "train.bin", 0, 200, document=10)
    batch = batches_of(short, freq=None).batch(0, 0, 6)
    ended = batch["input_ids"] == EOT
    assert ended.any() and (batch["labels"][ended] == IGNORED_TARGET).all()
    assert (batch["labels"][~ended] != IGNORED_TARGET).all()


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 6]), st.integers(0, 5))
def test_any_split_gives_the_same_global_batch(numbers, step, parts, seed):
    batches = batches_of(numbers, seed=seed)
    whole = batches.batch(step, 0, 6)
    rows = 6 // parts
    split = [batches_of(numbers, seed=seed).batch(step, i * rows, (i + 1) * rows) for i in range(parts)]
    for name in whole:
        assert torch.equal(whole[name], torch.cat([part[name] for part in split]))


def first_tokens(batches, rows):
    """The first token of the windows of the first `rows` rows of the endless sequence."""
    steps = -(-rows // batches.global_batch)
    firsts = torch.cat([batches.batch(step, 0, batches.global_batch)["input_ids"][:, 0] for step in range(steps)])
    return firsts[:rows].tolist()


def test_an_epoch_reads_every_window_once_at_a_shift_of_its_own(numbers):
    batches = batches_of(numbers, length=20, freq=4)  # 16 text tokens a window
    per_epoch = 1003 // 16 - 1  # one less than fit, for the shift
    firsts = first_tokens(batches, 3 * per_epoch)
    epochs = [sorted(firsts[i * per_epoch : (i + 1) * per_epoch]) for i in range(3)]
    for epoch in epochs:
        assert epoch == list(range(epoch[0], epoch[0] + 16 * per_epoch, 16))
        assert epoch[0] < 32 and epoch[-1] + 16 <= 1003
    assert len({epoch[0] for epoch in epochs}) > 1
    assert len({tuple(firsts[i * per_epoch : i * per_epoch + 6]) for i in range(3)}) == 3


def test_the_smallest_files(tmp_path):
    smallest = token_file(tmp_path / "train.bin", 0, 16)  # and its end of text: one window of 16 and what follows
    batches = batches_of(smallest, length=20, freq=4)
    assert set(first_tokens(batches, 12)) == {0}
    with pytest.raises(LandmarkError, match="holds 17 tokens, less than one window of 17"):
        batches_of(smallest, length=21, freq=4)
    with pytest.raises(LandmarkError, match=r"more text, or hold more of it out \(--validation-share\)$"):
        SequentialWindows(smallest, Windows(21, 4, LANDMARK, EOT))


def test_every_token_is_reached(tmp_path):
    few = token_file(tmp_path / "train.bin", 0, 39)  # two windows of 16 and a tail
    batches = batches_of(few, freq=None)
    seen = {int(token) for step in range(60) for token in batches.batch(step, 0, 6)["input_ids"].flatten()}
    assert seen == set(range(39))


@settings(max_examples=20)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=2))
def test_mixing_keeps_to_the_weights_exactly(numbers, others, weights):
    batches = batches_of(numbers, others, weights=weights)
    firsts = first_tokens(batches, 300)
    for rows in (1, 17, 300):
        from_first = sum(token < 5000 for token in firsts[:rows])
        assert abs(from_first - rows * weights[0] / sum(weights)) <= 1


def test_mixing_three_files_draws_from_each_as_if_it_were_alone(numbers, others, tmp_path):
    third = token_file(tmp_path / "train.bin", 20_000, 300)
    batches = batches_of(numbers, others, third, weights=[3, 2, 1])
    firsts = first_tokens(batches, 600)
    assert Counter(token // 5000 for token in firsts) == {0: 300, 1: 200, 4: 100}
    alone = first_tokens(batches_of(numbers), 300)
    assert [token for token in firsts if token < 5000] == alone


def test_without_weights_files_are_drawn_by_their_size(numbers, others):
    firsts = first_tokens(batches_of(numbers, others), 300)
    assert sum(token < 5000 for token in firsts) == pytest.approx(300 * 2 / 3, abs=4)


def test_seeds_and_steps_differ(numbers):
    ids = [batches_of(numbers, seed=seed).batch(step, 0, 6)["input_ids"] for seed, step in [(1, 0), (2, 0), (1, 1)]]
    assert not torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_the_order_of_batches_is_kept_between_versions(numbers):
    """Resuming an old run with a newer version has to go on with the same order."""
    assert first_tokens(batches_of(numbers, seed=7), 6) == [738, 959, 647, 270, 790, 452]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: batches_of(f, length=4, freq=4), "sequence length 4 is shorter than one block"),
        (lambda f: batches_of(f, length=0, freq=None), "at least 1, not 0"),
        (lambda f: batches_of(f, weights=[1, 2]), "2 mixing weights for 1 token file: give each file one"),
        (lambda f: batches_of(f, f, weights=[1, 0]), "must be above 0, not 1, 0"),
        (lambda f: batches_of(), "no token file"),
        (lambda f: next(iterate(batches_of(f), 0, world_size=4)), "batch of 6 cannot be split evenly over 4 processes"),
    ],
)
def test_settings_that_cannot_work(numbers, make, message):
    with pytest.raises(LandmarkError, match=message):
        make(numbers)


def test_wrong_rows_are_named(numbers):
    with pytest.raises(ValueError, match="rows 0 to 6, not 4 to 7"):
        batches_of(numbers).batch(0, 4, 7)
    with pytest.raises(ValueError, match="landmark_token_id"):
        Windows(16, 4, None, EOT)


def test_evaluation_reads_front_to_back(numbers):
    windows = SequentialWindows(numbers, Windows(20, 4, LANDMARK, EOT))
    assert len(windows) == 1003 // 16
    text = torch.cat([remove_landmarks(windows.batch(i, i + 5)["input_ids"], 5) for i in range(0, len(windows), 5)])
    assert torch.equal(text.flatten(), torch.arange(len(windows) * 16))
    few = SequentialWindows(numbers, Windows(20, 4, LANDMARK, EOT), limit=4)
    assert few.batch(0, 9)["input_ids"][:, 0].tolist() == [0, 15 * 16, 31 * 16, 46 * 16]


def test_iterating_gives_each_process_its_micro_batches(numbers):
    batches = batches_of(numbers, batch=12)
    for step in (5, 6):
        rows = []
        for rank in (0, 1):
            steps = list(iterate(batches, 5, 7, rank=rank, world_size=2, accumulation=3))
            assert len(steps) == 2 and all(micro["labels"].shape == (2, 16) for micro in steps[0])
            rows += [micro["input_ids"] for micro in steps[step - 5]]
        assert torch.equal(torch.cat(rows), batches.batch(step, 0, 12)["input_ids"])


def test_batches_are_made_by_one_thread_and_leave_the_others_to_the_rest(numbers, monkeypatch):
    """A team of threads for so few numbers once took a training run two thirds of its speed."""
    seen = []
    batches = batches_of(numbers)
    cut = batches.windows.cut
    monkeypatch.setattr(batches.windows, "cut", lambda places: seen.append(torch.get_num_threads()) or cut(places))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        steps = iterate(batches, 0, 3)
        next(steps)
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert len(list(steps)) == 2
        assert seen == [1, 1, 1] and later == [3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_iterating_without_an_end_stops_when_dropped(numbers):
    steps = iterate(batches_of(numbers), 0)
    next(steps)
    steps.close()
    assert not any(thread.name == "landmark-prefetch" and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.gpu
def test_iterating_onto_a_gpu(numbers):
    batches = batches_of(numbers)
    for step, (micro,) in enumerate(iterate(batches, 0, 20, device="cuda")):
        assert micro["input_ids"].device.type == "cuda"
        assert torch.equal(micro["labels"].cpu(), batches.batch(step, 0, 6)["labels"])
