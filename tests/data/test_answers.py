"""Answers in token files: which tokens they are, kept as safely as the ids; and what they weigh in a batch."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from landmark_cli.data import prepare as prepare_module
from landmark_cli.data.batches import Batches, SequentialWindows
from landmark_cli.data.corpora import Corpus
from landmark_cli.data.documents import Document, Marked, marked_pieces
from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.data.merge import Process
from landmark_cli.data.prepare import prepare
from landmark_cli.data.tasks.corpus import tasks_corpus
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_metadata import remove_token_file
from landmark_cli.data.token_file_writer import TokenFileWriter, Written
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.data.windows import AnswerWeights, Windows
from landmark_cli.errors import LandmarkError
from tests.awkward_tokenizers import byte_tokenizer
from tests.data.test_batches import EOT, LANDMARK, Numbers

GPT2 = load_tokenizer("gpt2")
PARTS = [
    [("The lamp, they said:", False), (" £12.50.\n", True), ("And the Größe, 東京 🙂?", False), (" naïve.", True)],
    [("Nothing is asked.", False)],
    [(" 7", True), (" and", False), (" more of it", True)],
]  # fmt: skip


def word_tokenizer(kind):
    """A tokenizer of the usual kinds, trained on a few words. "metaspace" puts a space before every text, as Llama 2's
    does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    alphabet = []
    if kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    text = " ".join(part for parts in PARTS for part, _ in parts)
    trainer = trainers.BpeTrainer(
        vocab_size=700 if kind == "metaspace" else 400,
        special_tokens=["<s>", "</s>", *alphabet],
        initial_alphabet=[] if alphabet else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="module", params=["gpt2", "bytes", "merged bytes", "metaspace", "python"])
def tokenizer(request, tmp_path_factory):
    if request.param == "gpt2":
        return GPT2
    made = byte_tokenizer() if request.param == "bytes" else word_tokenizer(request.param.split()[0])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    loaded = load_tokenizer(str(folder))
    if request.param == "python":
        # As if it had no parts in Rust: what it says of places is not asked for.
        loaded._fast, loaded._decodes_alone = None, False
    return loaded


def pieces_of(parts, limit=1 << 20):
    return list(marked_pieces("a document", parts, limit))


def test_a_piece_says_where_its_answers_are():
    for parts in PARTS:
        (piece,) = pieces_of(parts)
        assert piece == "".join(part for part, _ in parts).encode()
        assert [piece[a:b].decode() for a, b in piece.answers] == [part for part, answer in parts if answer]
    long = [("Where does it go on, and on? " * 30, False), (" Here and there." * 40, True), (" Yes. " * 20, False)]
    cut = pieces_of(long, 200)
    assert len(cut) > 5 and max(map(len, cut)) <= 200 and b"".join(cut).decode() == "".join(part for part, _ in long)
    assert "".join(piece[a:b].decode() for piece in cut for a, b in piece.answers) == long[1][0]


def test_marked_tokens_are_those_of_answers(tokenizer):
    """The ids are those of the text without marks, and what is marked is the answers, token by token."""
    pieces = [piece for parts in PARTS for piece in pieces_of(parts)]
    ids, marks = tokenizer.encode_marked(pieces)
    for expected, found in zip(tokenizer.encode_documents(pieces), ids, strict=True):
        assert expected.tolist() == found.tolist()
    for parts, row, marked in zip(PARTS, ids, marks, strict=True):
        assert marked.dtype == np.uint8 and marked.shape == row.shape
        answers = [part for part, answer in parts if answer]
        groups = np.split(np.arange(len(row)), np.flatnonzero(np.diff(marked)) + 1)
        found = [tokenizer.decode(row[group]).strip() for group in groups if len(group) and marked[group[0]]]
        assert found == [answer.strip() for answer in answers]


def marked_file(path, count=1003, document=90, **more):
    """Tokens 0, 1, ...; those that 3 divides are answers."""
    with TokenFileWriter(path, Numbers, source="numbers", answers=True, **more) as writer:
        for start in range(0, count, document):
            ids = np.arange(start, min(start + document, count))
            writer.add_document(ids, marks=ids % 3 == 0)
    return TokenFile.open(path)


def test_written_and_read_again(tmp_path):
    file = marked_file(tmp_path / "train.bin")
    ends = file.tokens == EOT
    assert file.answers.tolist() == np.where(ends, np.roll(file.tokens % 3 == 0, 1), file.tokens % 3 == 0).tolist()
    assert file.metadata.answers.tokens == file.answers.sum() > 300
    assert (tmp_path / "train.loss.bin").stat().st_size == len(file.tokens)
    with TokenFileWriter(tmp_path / "train.bin", Numbers, source="numbers") as writer:
        writer.add_document(np.arange(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "train.json"]
    assert TokenFile.open(tmp_path / "train.bin").answers is None
    assert "answers" not in json.loads((tmp_path / "train.json").read_text())
    marked_file(tmp_path / "train.bin")
    remove_token_file(tmp_path / "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing"])
def test_damaged_answers_are_found(tmp_path, damage):
    marked_file(tmp_path / "train.bin")
    path = tmp_path / "train.loss.bin"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(bytes([1 - data[0]]) + data[1:] if damage == "changed" else data[:-1])
    with pytest.raises(LandmarkError, match=r"train.loss.bin was truncated or changed .* prepare the corpus again"):
        TokenFile.open(tmp_path / "train.bin")


def test_a_copy_is_checked_once(tmp_path, monkeypatch):
    marked_file(tmp_path / "train.bin")
    path = tmp_path / "train.loss.bin"
    path.write_bytes(path.read_bytes())
    monkeypatch.setattr("landmark_cli.data.token_file.ALWAYS_CHECKED_BYTES", 0)
    hashed = []
    monkeypatch.setattr(
        "landmark_cli.data.token_file.hash_file", lambda file, real=prepare_module.hashlib.sha256: _hash(file, hashed)
    )
    for _ in range(2):
        assert TokenFile.open(tmp_path / "train.bin").answers is not None
    assert hashed == ["train.loss.bin"]


def _hash(file, hashed):
    hashed.append(file.name)
    return prepare_module.hashlib.sha256(file.read_bytes())


def test_going_on_behind_a_checkpoint(tmp_path):
    expected = marked_file(tmp_path / "whole/train.bin", 180)
    writer = TokenFileWriter(tmp_path / "train.bin", Numbers, source="numbers", answers=True)
    writer.add_document(np.arange(90), marks=np.arange(90) % 3 == 0)
    state = writer.checkpoint()
    writer.append(np.arange(50), marks=np.ones(50))
    writer.close()
    assert isinstance(state, Written) and state.answers_sha256
    with TokenFileWriter(tmp_path / "train.bin", Numbers, source="numbers", answers=True, resume=state) as writer:
        writer.add_document(np.arange(90, 180), marks=np.arange(90, 180) % 3 == 0)
    file = TokenFile.open(tmp_path / "train.bin")
    assert file.metadata.answers.sha256 == expected.metadata.answers.sha256
    assert file.metadata.answers.tokens == expected.metadata.answers.tokens
    damaged = tmp_path / "train.loss.bin.partial"
    damaged.write_bytes(b"\2" * 200)
    (tmp_path / "train.bin.partial").write_bytes((tmp_path / "train.bin").read_bytes())
    with pytest.raises(LandmarkError, match="is not what had been written to it"):
        TokenFileWriter(tmp_path / "train.bin", Numbers, source="numbers", answers=True, resume=state)


def corpus_of(documents):
    def all_documents():
        for number, parts in enumerate(documents):
            split = "validation" if number % 10 == 5 else "train"
            yield split, Document(str(number), 10, lambda limit, parts=parts: marked_pieces("a document", parts, limit))

    return Corpus("made", "made up", all_documents, None, "made up", has_answers=True)


DOCUMENTS = [[(f"Document {n} asks {n * 7}:", False), (f" it is {n * 13}.", True)] for n in range(70)]


def answers_of(file, tokenizer=GPT2):
    """The texts of all answers."""
    tokens, marks = np.asarray(file.tokens), np.asarray(file.answers)
    groups = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(marks)) + 1)
    return [tokenizer.decode(tokens[group]) for group in groups if marks[group[0]]]


def test_prepared_by_one_process_or_several_or_after_a_kill(tmp_path, monkeypatch):
    whole = prepare(corpus_of(DOCUMENTS), GPT2, tmp_path / "whole")
    file = TokenFile.open(tmp_path / "whole/train.bin")
    train = [parts for number, parts in enumerate(DOCUMENTS) if number % 10 != 5]
    assert answers_of(file) == [f"{parts[1][0]}<|endoftext|>" for parts in train]
    for rank in (2, 1, 0):
        parts = prepare(corpus_of(DOCUMENTS), GPT2, tmp_path / "parts", process=Process(rank, 3))
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", 8)
    kept, checkpoints = TokenFileWriter.checkpoint, []

    def checkpoint(writer):
        checkpoints.append(writer)
        if len(checkpoints) == 6:
            raise ZeroDivisionError
        return kept(writer)

    monkeypatch.setattr(TokenFileWriter, "checkpoint", checkpoint)
    with pytest.raises(ZeroDivisionError):
        prepare(corpus_of(DOCUMENTS), GPT2, tmp_path / "cut")
    assert (tmp_path / "cut/train.loss.bin.partial").stat().st_size > 0
    resumed = prepare(corpus_of(DOCUMENTS), GPT2, tmp_path / "cut")
    for made in (parts, resumed):
        for split in ("train", "validation"):
            assert made[split].sha256 == whole[split].sha256
            assert made[split].answers.sha256 == whole[split].answers.sha256
            assert made[split].answers.tokens == whole[split].answers.tokens > 0
    assert not list(tmp_path.glob("*/*.partial"))


def test_a_long_document_keeps_its_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(GPT2, "piece_bytes", 300)
    parts = [("Where to? " * 100, False), (" Here and there." * 100, True), (" Or not?" * 100, False), (" No.", True)]
    prepare(corpus_of([parts]), GPT2, tmp_path)
    assert answers_of(TokenFile.open(tmp_path / "train.bin")) == [parts[1][0], " No.<|endoftext|>"]


def test_tasks_mark_their_answers(tokenizer, tmp_path):
    settings = {"documents": 12, "shortest": 2000, "longest": 3000, "validation_share": 0}
    corpus = tasks_corpus(tokenizer, **settings)
    prepare(corpus, tokenizer, tmp_path)
    file = TokenFile.open(tmp_path / "train.bin")
    pieces = [piece for _, document in corpus.documents() for piece in document.pieces(1 << 20)]
    assert all(isinstance(piece, Marked) for piece in pieces)
    expected = [piece[a:b].decode().strip() for piece in pieces for a, b in piece.answers]
    end = tokenizer.decode([tokenizer.eot_id])
    found = [answer.removesuffix(end).strip() for answer in answers_of(file, tokenizer)]
    # One of the tokenizers may join the end of a question's last word and the space behind it: a token of both.
    pairs = zip(found, expected, strict=True)
    assert all(one.endswith(answer) and len(one) < len(answer) + 3 for one, answer in pairs)


@pytest.mark.parametrize("include_landmarks", [False, True], ids=["text", "landmarks too"])
@pytest.mark.parametrize(("length", "freq"), [(20, None), (20, 4), (19, 4), (21, 4), (2, 1), (16, 7)])
def test_weights_are_those_of_each_positions_target(tmp_path, length, freq, include_landmarks):
    """Tokens say themselves whether they are of answers, so labels say what their positions weigh."""
    if freq is None and include_landmarks:
        return
    marked = marked_file(tmp_path / "train.bin", document=2000)
    windows = Windows(length, freq, LANDMARK, EOT, include_landmarks)
    for settings, other in ((AnswerWeights(5.0), 1.0), (AnswerWeights(answers_only=True), 0.0)):
        batches = Batches([marked], None, windows, 8, 0, settings)
        answer = settings.answer
        for step in range(4):
            batch = batches.batch(step, 0, 8)
            labels, weights = batch["labels"], batch["weights"]
            of_answers = (labels % 3 == 0) & (labels < EOT)
            expected = torch.where(of_answers, answer, other).masked_fill(labels == IGNORED_TARGET, 0.0)
            # The end of text behind an answer is of the answer.
            ended = labels == EOT
            assert weights.dtype == torch.float32 and torch.equal(weights[~ended], expected[~ended])
    (every,) = [SequentialWindows(marked, windows)]
    batch = every.batch(0, len(every))
    of_answers = (batch["labels"] % 3 == 0) & (batch["labels"] != LANDMARK)
    kept = (batch["labels"] != IGNORED_TARGET) & (batch["labels"] != EOT)
    assert torch.equal(batch["answers"][kept], of_answers[kept]) and of_answers[kept].any()


def test_files_without_marks_count_whole(tmp_path):
    marked = marked_file(tmp_path / "marked.bin", document=2000)
    with TokenFileWriter(tmp_path / "plain.bin", Numbers, source="numbers") as writer:
        writer.add_document(np.arange(5000, 5500))
    plain = TokenFile.open(tmp_path / "plain.bin")
    windows = Windows(20, 4, LANDMARK, EOT)
    batches = Batches([marked, plain], [1, 1], windows, 16, 0, AnswerWeights(answers_only=True))
    batch = batches.batch(0, 0, 16)
    rows = batch["input_ids"][:, 0] >= 5000
    counted = batch["weights"].sum(1)
    targets = (batch["labels"] != IGNORED_TARGET).sum(1)
    assert 0 < rows.sum() < 16
    assert torch.equal(counted[rows], targets[rows].float()) and (counted[~rows] < 0.5 * targets[~rows]).all()
    usual = Batches([marked, plain], [1, 1], windows, 16, 0).batch(0, 0, 16)
    assert usual.keys() == {"input_ids", "labels"}
    assert all(torch.equal(usual[name], batch[name]) for name in usual)
    assert "answers" not in SequentialWindows(plain, windows).batch(0, 2)
