"""Landmarks in token tensors: laws that hold for any text, and the rules of the targets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from landmark_cli.data.landmarks import (
    IGNORED_TARGET,
    default_top_k,
    insert_landmarks,
    landmark_positions,
    largest_top_k,
    next_token_targets,
    remove_landmarks,
    stream_length,
    text_length,
)

LANDMARK, EOT = 99, 50
freqs = st.integers(1, 9)
texts = st.lists(st.integers(0, 60), max_size=60).map(lambda ids: torch.tensor(ids, dtype=torch.int64))


@given(texts, freqs)
def test_removing_what_was_inserted_gives_the_text_back(text, freq):
    stream = insert_landmarks(text, freq, LANDMARK)
    assert stream.shape[-1] == stream_length(len(text), freq)
    assert torch.equal(stream == LANDMARK, landmark_positions(len(stream), freq + 1))
    assert torch.equal(remove_landmarks(stream, freq + 1), text)


@given(st.integers(0, 10_000), freqs)
def test_lengths_are_inverse(length, freq):
    assert text_length(stream_length(length, freq), freq) == length
    # A stream cut right before a landmark is the one length that no text gives: that text's landmark is one further on.
    missing = length % (freq + 1) == freq
    assert stream_length(text_length(length, freq), freq) == length + missing


@given(texts, freqs)
def test_other_dimensions_and_dtypes_are_left_alone(text, freq):
    pair = torch.stack([text, text + 1]).to(torch.int32).unsqueeze(1)
    stream = insert_landmarks(pair, freq, LANDMARK)
    assert stream.dtype == torch.int32 and stream.shape[:2] == (2, 1)
    for row in (0, 1):
        assert torch.equal(stream[row, 0], insert_landmarks(pair[row, 0], freq, LANDMARK))


def slow_targets(stream: list[int], following: int | None) -> list[int]:
    """The rule, position by position."""
    targets = []
    for position, token in enumerate(stream):
        later = [t for t in stream[position + 1 :] if t != LANDMARK]
        if following not in (None, LANDMARK):
            later.append(following)
        targets.append(later[0] if later and token not in (LANDMARK, EOT) else IGNORED_TARGET)
    return targets


uneven = st.lists(st.one_of(st.integers(48, 52), st.just(LANDMARK)), max_size=40)


@given(uneven, st.one_of(st.none(), st.sampled_from([3, EOT, LANDMARK])))
def test_targets_follow_the_rule_wherever_landmarks_stand(stream, following):
    ids = torch.tensor(stream, dtype=torch.int64)
    after = None if following is None else torch.tensor(following)
    targets = next_token_targets(ids, landmark_token_id=LANDMARK, eot_id=EOT, following=after)
    assert targets.tolist() == slow_targets(stream, following)


@given(texts, freqs, st.integers(0, 60))
def test_text_targets_do_not_depend_on_landmarks(text, freq, following):
    after = torch.tensor(following)
    plain = next_token_targets(text, landmark_token_id=None, eot_id=EOT, following=after)
    stream = insert_landmarks(text, freq, LANDMARK)
    targets = next_token_targets(stream, landmark_token_id=LANDMARK, eot_id=EOT, following=after)
    assert torch.equal(remove_landmarks(targets, freq + 1), plain)
    assert (targets[landmark_positions(len(stream), freq + 1)] == IGNORED_TARGET).all()


def test_targets_of_a_small_stream():
    stream = torch.tensor([1, 2, LANDMARK, EOT, 4, LANDMARK, 5, EOT, LANDMARK])
    ignored = IGNORED_TARGET
    given_next = {"landmark_token_id": LANDMARK, "eot_id": EOT, "following": torch.tensor(6)}
    targets = next_token_targets(stream, **given_next)
    assert targets.tolist() == [2, EOT, ignored, ignored, 5, ignored, EOT, ignored, ignored]
    counted = next_token_targets(stream, **given_next, include_landmarks=True)
    assert counted.tolist() == [2, LANDMARK, EOT, ignored, LANDMARK, 5, EOT, ignored, ignored]


def test_following_tokens_belong_to_rows():
    stream = torch.tensor([[1, 2], [3, 4]])
    targets = next_token_targets(stream, landmark_token_id=LANDMARK, eot_id=None, following=torch.tensor([7, 8]))
    assert targets.tolist() == [[2, 7], [4, 8]]
    without = next_token_targets(stream, landmark_token_id=LANDMARK, eot_id=None)
    assert without.tolist() == [[2, IGNORED_TARGET], [4, IGNORED_TARGET]]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: insert_landmarks(torch.zeros(4, dtype=torch.int64), 0, 9), "landmark_freq"),
        (lambda: insert_landmarks(torch.zeros(4, dtype=torch.int16), 2, 50260), "landmark_token_id"),
        (lambda: remove_landmarks(torch.zeros(4), 1), "block_size"),
        (lambda: stream_length(-1, 2), "text_length"),
        (lambda: text_length(-1, 2), "stream_length"),
        (lambda: landmark_positions(-1, 2), "length"),
        (
            lambda: next_token_targets(
                torch.zeros(2, 4, dtype=torch.int64), landmark_token_id=9, eot_id=8, following=torch.zeros(3)
            ),
            "following",
        ),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(
    ("length", "freq", "grouped", "joint"),
    [(8192, 63, 4, 16), (2048, 63, 4, 7), (1024, 63, 4, 4), (256, 63, 2, 2), (64, 63, 0, 0), (8192, 15, 4, 16)],
)
def test_a_model_retrieves_what_there_is_room_for_unless_told(length, freq, grouped, joint):
    assert (default_top_k(length, freq), default_top_k(length, freq, joint=True)) == (grouped, joint)
    assert default_top_k(length, freq, joint=True) <= max(0, largest_top_k(length, freq))
