"""Tasks mixed into a run: their share is exact, none is cut, and each is hidden in the text of its own split."""

import re

import numpy as np
import pytest
import torch

from landmark_cli.data.batches import Batches
from landmark_cli.data.merge import Process
from landmark_cli.data.packing import document_ends
from landmark_cli.data.tasks.mixing import VALIDATION_DOCUMENTS, TokenHaystack, prepare_tasks, why_no_tasks
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.data.training_data import TrainingData
from landmark_cli.data.windows import Windows

GPT2 = load_tokenizer("gpt2")
FREQ, LANDMARK, LENGTH = 15, 50260, 640
TEXT = 600


def prose(word, sentences):
    return " ".join(f"The {word} of day {n} came down the river, and nobody saw it." for n in range(sentences))


def write(path, word, documents=3, sentences=150):
    with TokenFileWriter(path, GPT2, source=f"{word}s") as writer:
        for _ in range(documents):
            writer.add_document(np.array(GPT2.encode(prose(word, sentences))))
    return TokenFile.open(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A directory of token files: barges to train on, swans held out."""
    root = tmp_path_factory.mktemp("text")
    write(root / "train.bin", "barge")
    write(root / "validation.bin", "swan", documents=1)
    return root


def prepare(corpus, output, *, windows=40, **changes):
    files = [[TokenFile.open(corpus / f"{split}.bin")] for split in ("train", "validation")]
    settings = {"text_length": TEXT, "windows": windows, "seed": 0, "resume": False, "process": Process()}
    prepare_tasks(*files, GPT2, output, **settings | changes)
    return output


@pytest.fixture(scope="module")
def tasks(corpus, tmp_path_factory):
    return prepare(corpus, tmp_path_factory.mktemp("tasks"))


def documents(directory):
    return sum(TokenFile.open(directory / f"{split}.bin").metadata.documents for split in ("train", "validation"))


def batches(data, seed=3):
    windows = Windows(LENGTH, FREQ, LANDMARK, GPT2.eot_id)
    return data.batches(windows, 8, seed, mark_answers=True)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 1.0])
def test_the_share_of_windows_is_exact_in_the_long_run_and_the_same_again(corpus, tasks, share):
    data = TrainingData.open([corpus]).with_tasks(tasks, share)
    made, again = batches(data), batches(data)
    found = [made._place(row).file.metadata.answers is not None for row in range(1000)]
    for rows in (10, 100, 1000):
        assert abs(sum(found[:rows]) - share * rows) <= 1
    for step in (0, 7):
        whole = made.batch(step, 0, 8)
        halves = [again.batch(step, start, start + 4) for start in (0, 4)]
        for name, tensor in whole.items():
            assert tensor.equal(torch.cat([half[name] for half in halves]))
        assert whole["answers"].any(1).sum() == sum(found[8 * step : 8 * step + 8])


def test_other_corpora_keep_their_proportions(corpus, tasks, tmp_path):
    write(tmp_path / "train.bin", "goose", documents=6)
    data = TrainingData.open([corpus, tmp_path], validation=False).with_tasks(tasks, 0.25)
    tasks_share, *others = data.weights
    sizes = [len(file.tokens) for file in data.train[1:]]
    assert tasks_share == 0.25 and np.allclose(others, 0.75 * np.array(sizes) / sum(sizes))
    assert TrainingData.open([corpus, tmp_path], [3.0, 1.0], validation=False).with_tasks(tasks, 0.5).weights == [
        0.5,
        0.375,
        0.125,
    ]


def test_a_window_of_tasks_is_one_whole_document_and_others_are_cut_anywhere(corpus, tasks):
    data = TrainingData.open([corpus]).with_tasks(tasks, 0.5)
    made = batches(data)
    ends = set(document_ends(data.train[0]).tolist()) | {0}
    seen = {False: set(), True: set()}
    for row in range(300):
        place = made._place(row)
        of_tasks = place.file is data.train[0]
        seen[of_tasks].add(place.start)
        if of_tasks:
            assert {place.start, place.start + place.length} <= ends
            assert 0.7 * TEXT < place.length <= TEXT
        else:
            assert place.length == TEXT
    # Text begins elsewhere in each epoch.
    assert len(seen[False]) > len(data.train[1].tokens) // TEXT


def test_tasks_are_hidden_in_the_text_of_their_split_alone(corpus, tasks):
    for split, other in (("train", "swan"), ("validation", "barge")):
        file = TokenFile.open(tasks / f"{split}.bin")
        text = GPT2.decode(file.tokens)
        own = {"swan": "barge", "barge": "swan"}[other]
        assert f" {other} of day" not in text and len(re.findall(f" {own} of day", text)) > 20 * file.metadata.documents
        assert file.metadata.answers.tokens > file.metadata.documents
    assert documents(tasks) == 40 + VALIDATION_DOCUMENTS


def test_validation_reads_whole_tasks_too(corpus, tasks):
    data = TrainingData.open([corpus]).with_tasks(tasks, 0.5)
    of_tasks, of_text = data.validation_windows(Windows(LENGTH, FREQ, LANDMARK, GPT2.eot_id), 20)
    assert len(of_tasks) == 10 and of_tasks.batch(0, 10)["answers"].any(1).all()
    assert "answers" not in of_text.batch(0, len(of_text))


def test_a_run_that_goes_on_keeps_the_documents_that_it_began_with(corpus, tmp_path):
    first = (prepare(corpus, tmp_path, windows=40) / "train.bin").read_bytes()
    prepare(corpus, tmp_path, windows=300, resume=True)
    assert (tmp_path / "train.bin").read_bytes() == first
    prepare(corpus, tmp_path, windows=300)
    assert documents(tmp_path) == 300 + VALIDATION_DOCUMENTS


def test_without_held_out_text_there_are_no_tasks_for_validation(corpus, tmp_path):
    file = TokenFile.open(corpus / "train.bin")
    how = {"text_length": TEXT, "windows": 33, "seed": 0, "resume": False, "process": Process()}
    prepare_tasks([file], [], GPT2, tmp_path, **how)
    assert TokenFile.open(tmp_path / "train.bin").metadata.documents == 33
    assert not (tmp_path / "validation.bin").exists()


def test_slices_begin_with_a_sentence_and_go_round(tmp_path):
    files = [write(tmp_path / f"{word}.bin", word, documents=2, sentences=40) for word in ("barge", "swan")]
    haystack = TokenHaystack(files, GPT2)
    for share in np.linspace(0, 0.999, 50):
        text = GPT2.decode(haystack.slice(share, 1000))
        assert re.match(r"\s*The (barge|swan) of day", text) and len(haystack.slice(share, 1000)) == 1000
        assert ("barge" in text) == (share < 0.5) and "endoftext" not in text
        assert len(haystack.slice(share, 5000)) == 5000


def test_why_there_are_no_tasks(corpus):
    class Forgetful:
        name = "uncased"

        def encode(self, text):
            return GPT2.encode(re.sub(r"\d", "0", text))

        def decode(self, ids):
            return GPT2.decode(ids)

    file = TokenFile.open(corpus / "train.bin")
    assert "uncased does not give back the numbers" in why_no_tasks([file], Forgetful(), 10_000)
    why = why_no_tasks([file], GPT2, 100)
    least = int(re.search(r"at least (\d+) text tokens, and these have 100", why)[1])
    assert why_no_tasks([file], GPT2, least - 1) and why_no_tasks([file], GPT2, least) is None


def test_packs_are_of_each_file(corpus, tasks):
    files = [TokenFile.open(path / "train.bin") for path in (corpus, tasks)]
    windows = Windows(LENGTH, FREQ, LANDMARK, GPT2.eot_id)
    made = Batches(files, [1.0, 1.0], windows, 4, 0, packs=["cut", "whole"])
    assert {made._place(row).length for row in range(20) if made._place(row).file is files[0]} == {TEXT}
    assert made.batch(0, 0, 4)["input_ids"].shape == (4, LENGTH)
