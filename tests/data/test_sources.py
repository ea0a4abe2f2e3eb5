"""What is found in local sources: files of every kind, the splits that names make, and what is left out."""

import os

import pytest

from landmark_cli.data.corpora import open_corpus
from landmark_cli.data.readers import ENDINGS
from landmark_cli.data.sources import find_sources
from landmark_cli.errors import LandmarkError
from tests.data.texts import json_lines, taken, write, write_parquet

NOVELS = [f"novel{i}.txt" for i in range(1, 9)]


def folder(root, *names):
    for name in names:
        if name.lower().endswith(".parquet"):
            write_parquet(root / name, [{"text": name}])
        elif ".jsonl" in name.lower():
            write(root / name, json_lines([{"text": name}]))
        else:
            write(root / name, name)
    return root


def splits(root, *sources, endings=ENDINGS, **settings):
    """The files by split, as paths in `root`."""
    found = find_sources([root / source for source in sources or ["."]], endings, **settings)
    by_split = {}
    for file in found.files:
        by_split.setdefault(file.split, []).append(file.path.relative_to(root).as_posix())
    return by_split, found


# A folder's files, and those that fall into splits; where none do, all files are documents of one corpus.
LAYOUTS = {
    "a novel named like a split": ([*NOVELS, "train-robbery.txt"], None),
    "notes named like a split": ([*NOVELS, "dev-notes.md"], None),
    "one named as a split is": ([*NOVELS, "test.txt"], None),
    "a training file among others": ([*NOVELS, "train.txt"], None),
    "a folder of a split among others": ([*NOVELS, "train/1.txt", "validation/2.txt"], None),
    "validation_set.txt": (["train/1.txt", "validation_set.txt"], None),
    "folders": (
        ["train/1.txt", "validation/2.txt", "test/3.txt"],
        {"train": ["train/1.txt"], "validation": ["validation/2.txt"], "test": ["test/3.txt"]},
    ),
    "folders of other letters and names": (
        ["Train/1.txt", "VALID/2.txt"],
        {"train": ["Train/1.txt"], "validation": ["VALID/2.txt"]},
    ),
    "folders in folders": (
        ["en/train/a/1.txt", "en/dev/2.txt", "fr/train/3.txt"],
        {"train": ["en/train/a/1.txt", "fr/train/3.txt"], "validation": ["en/dev/2.txt"]},
    ),
    "shards": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        {
            "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "test": ["data/test-00000-of-00001.parquet"],
        },
    ),
    "shards with a hash": (
        ["train-00000-of-00001-0f1e2d3c4b5a6978.parquet"],
        {"train": ["train-00000-of-00001-0f1e2d3c4b5a6978.parquet"]},
    ),
    "whole files": (
        ["train.jsonl", "validation.jsonl", "README.md"],
        {"train": ["train.jsonl"], "validation": ["validation.jsonl"]},
    ),
    "what stands about them": (
        ["README.md", "LICENSE.txt", "train/1.txt", "validation/2.txt"],
        {"train": ["train/1.txt"], "validation": ["validation/2.txt"]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_make_splits_only_where_every_file_falls_into_one(tmp_path, name):
    names, expected = LAYOUTS[name]
    by_split, found = splits(folder(tmp_path, *names))
    assert by_split == (expected or {None: sorted(names)})
    left_out = {name for names in found.left_out.values() for name in names}
    assert left_out == set(names) - {file for files in by_split.values() for file in files}
    for word in left_out:
        assert word in found.not_read()
    # Somebody may have meant one.
    meant = expected is None and any(name.startswith(("train/", "train.", "test.")) for name in names)
    assert bool(found.notes) == meant


def test_nine_novels_of_which_one_is_about_a_train(tmp_path, capsys):
    folder(tmp_path, *NOVELS, "train-robbery.txt")
    found = [(split, document.name) for split, document in open_corpus("text", [str(tmp_path)]).documents()]
    assert sorted(name.rpartition("/")[2] for _, name in found) == [*NOVELS, "train-robbery.txt"]
    assert [split for split, _ in found].count("validation") == 1
    assert "found 9 .txt files, 97 B in" in capsys.readouterr().err


def test_a_corpus_that_has_splits_keeps_them(tmp_path):
    folder(tmp_path, "train/1.txt", "validation/2.txt", "metadata.txt", "README.txt")
    by_split, found = splits(tmp_path, keeps_splits=True)
    assert by_split == {"train": ["train/1.txt"], "validation": ["validation/2.txt"]}
    assert "1 file of" in found.notes[0] and "metadata.txt" in found.notes[0]
    assert found.left_out == {"about the data set": ["README.txt"]}


def test_sources_that_are_a_split_each(tmp_path):
    folder(tmp_path, "a/train/1.txt", "a/validation/2.txt", "train.jsonl", "notes/3.txt")
    assert splits(tmp_path, "a/train", "a/validation")[0] == {
        "train": ["a/train/1.txt"],
        "validation": ["a/validation/2.txt"],
    }
    assert splits(tmp_path, "train.jsonl", "a/validation")[0]["validation"] == ["a/validation/2.txt"]
    # One of them alone is a corpus of its own, and so is one beside others.
    assert splits(tmp_path, "a/train")[0] == {None: ["a/train/1.txt"]}
    assert splits(tmp_path, "a/validation", "notes")[0] == {None: ["a/validation/2.txt", "notes/3.txt"]}
    # What is named beside a corpus with splits is trained on.
    texts = {}
    for split, document in open_corpus("text", [str(tmp_path / "notes"), str(tmp_path / "a")]).documents():
        texts.setdefault(split, []).extend(taken([document])[0])
    assert texts == {"train": ["notes/3.txt", "a/train/1.txt"], "validation": ["a/validation/2.txt"]}


def test_training_text_alone_gives_some_for_validation(tmp_path):
    folder(tmp_path, *(f"train/{i}.txt" for i in range(20)), "test/x.txt")
    found = {}
    for split, _ in open_corpus("text", [str(tmp_path)], validation_share=0.1).documents():
        found[split] = found.get(split, 0) + 1
    assert found == {"train": 18, "validation": 2, "test": 1}
    write(tmp_path / "one" / "train" / "book.txt", "a line\n" * 100)
    assert {split for split, _ in open_corpus("text", [str(tmp_path / "one")]).documents()} == {"train", "validation"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_in_either_case(tmp_path, ending):
    mixed = ending[:2] + ending[2:].upper()
    data = folder(tmp_path, f"row{ending}").joinpath(f"row{ending}").read_bytes()
    if ending.endswith(("gz", "zst")):
        from tests.data.texts import packed

        data = packed(ending, data)
    for number, name in enumerate((f"row{ending}", f"A{ending.upper()}", f"b{mixed}")):
        write(tmp_path / str(number) / name, data)
        for source in (str(tmp_path / str(number)), str(tmp_path / str(number) / name)):
            texts, bad = taken(open_corpus("text", [source], validation_share=0))
            assert (texts, bad) == ([f"row{ending}"], [])
    with pytest.raises(LandmarkError, match="there is no file or folder"):
        open_corpus("text", [f"some/A{ending.upper()}"])


@pytest.mark.parametrize("corpus", ["pg19", "arxiv-math", "redpajama"])
def test_a_known_corpus_takes_no_files_that_are_not_its_own(tmp_path, capsys, corpus):
    name = "b.txt" if corpus == "pg19" else "b.jsonl"
    folder(tmp_path, name, "a.md", "sub/thesis.tex", "sub/chapters/one.TEX")
    texts, _ = taken(open_corpus(corpus, [str(tmp_path)], validation_share=0))
    assert texts == [name]
    said = capsys.readouterr().err
    assert f"found 1 {os.path.splitext(name)[1]} file" in said
    assert "left out: 3 of another kind (a.md, sub/thesis.tex, sub/chapters/one.TEX)" in said


def test_whatever_is_left_out_is_counted_and_named(tmp_path, capsys):
    folder(
        tmp_path,
        "a.txt",
        "sub/b.TXT",
        "empty.txt",
        "c.log",
        ".hidden.txt",
        ".git/d.txt",
        *(f"{i}.png" for i in range(7)),
    )
    write(tmp_path / "empty.txt", "")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sub")
    open_corpus("text", [str(tmp_path)])
    said = capsys.readouterr().err
    assert f"found 3 .txt files, 14 B, 1 of them empty in {tmp_path}" in said
    assert "1 linked folders (elsewhere)" in said
    assert "2 hidden (.git, .hidden.txt)" in said
    assert "8 of another kind (0.png, 1.png, 2.png, 3.png, 4.png and 3 more)" in said
    assert "1 no ordinary files (pipe.txt)" in said


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.log"], r"holds no file with one of the endings .*left out: 1 of another kind \(a.log\)"),
        (["test/1.txt", "validation/2.txt"], "has a validation split but no training documents"),
    ],
)
def test_folders_that_hold_nothing_to_train_on(tmp_path, names, message):
    folder(tmp_path, *names)
    with pytest.raises(LandmarkError, match=message):
        open_corpus("text", [str(tmp_path)])


def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path, monkeypatch):
    folder(tmp_path, "a.txt", "closed/b.txt")
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(LandmarkError, match=r"closed cannot be read: Permission denied"):
        open_corpus("text", [str(tmp_path)])


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(LandmarkError, match=r"pipe\.txt is neither a file nor a folder"):
        open_corpus("text", [str(tmp_path / "pipe.txt")])
