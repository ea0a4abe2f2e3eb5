"""What is wrong is named in one line, and nothing that looks finished is left."""

import errno
import json
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from landmark_cli.commands.weight_diff import parse_size
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.weight_diff import manifest, output
from tests.weight_diff.weights import GOLDENS, assert_same_bits, golden, load, make, recover, save, write_manifest

RAW, TUNED, AUTHORS_DIFF = GOLDENS / "raw", GOLDENS / "tuned", GOLDENS / "diff"


@pytest.fixture
def diff(tmp_path):
    """Our difference of the golden models, in several files."""
    return make(RAW, TUNED, tmp_path / "diff", max_shard_size="100kB")


def fails(match, action, *arguments, kind=LandmarkError, **options):
    """The action fails with one line of this kind and leaves none of the directory it was to write."""
    with pytest.raises(kind, match=match) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(arguments[-1].parent.glob(f"{arguments[-1].name}*"))
    return message


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# Raw weights of another model


def test_raw_of_another_width(tmp_path, diff):
    raw = {name: tensor[:32] if tensor.ndim == 1 else tensor[:, :32] for name, tensor in golden("raw").items()}
    raw = save(tmp_path / "small", {name: tensor.contiguous() for name, tensor in raw.items()})
    sizes = r"model\.embed_tokens\.weight is 300 x 32 in it and 302 x 64 in --path-tuned"
    fails(rf"--path-raw .*{sizes} \(and \d+ more such tensors\)", make, raw, TUNED, tmp_path / "new")
    fails("model.embed_tokens.weight is 300 x 32", recover, raw, AUTHORS_DIFF, tmp_path / "out")
    fails("model.embed_tokens.weight is 300 x 32", recover, raw, diff, tmp_path / "out")


@pytest.mark.parametrize("missing", ["raw", "tuned"])
def test_models_of_different_depth(tmp_path, missing):
    name = "model.layers.1.mlp.down_proj.weight"
    folders = {"raw": RAW, "tuned": TUNED}
    tensors = golden(missing)
    del tensors[name]
    folders[missing] = save(tmp_path / missing, tensors)
    owner = {"raw": "it", "tuned": "--path-tuned"}[missing]
    fails(f"{owner} has no {name}", make, folders["raw"], folders["tuned"], tmp_path / "new")


def test_raw_with_fewer_tokens_than_its_configuration_says(tmp_path):
    raw = golden("raw")
    raw["model.embed_tokens.weight"] = raw["model.embed_tokens.weight"][:299].clone()
    raw = save(tmp_path / "raw", raw, config=json.loads((RAW / "config.json").read_text()))
    fails("model.embed_tokens.weight is 299 x 64 in it and 302 x 64", make, raw, TUNED, tmp_path / "new")


def test_one_changed_number_in_raw(tmp_path, diff):
    raw = golden("raw")
    raw["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-6
    raw = save(tmp_path / "other", raw)
    message = fails("--path-raw", recover, raw, diff, tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight is not that of raw, which the difference was made from" in message
    recover(raw, diff, tmp_path / "out", verify=False)
    fails("the sum of the recovered tensors is", recover, save_shifted(tmp_path), AUTHORS_DIFF, tmp_path / "out2")


def save_shifted(tmp_path):
    return save(tmp_path / "shifted", {name: tensor + 1e-3 for name, tensor in golden("raw").items()})


# Files


def test_a_missing_shard(tmp_path):
    raw = save(tmp_path / "raw", golden("raw"), shards=3)
    (raw / "model-00002-of-00003.safetensors").unlink()
    fails("model-00002-of-00003.safetensors is missing", make, raw, TUNED, tmp_path / "new")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("keep", [0.9, 0.001, 0])
def test_a_truncated_shard(tmp_path, kind, keep):
    raw = save(tmp_path / "raw", golden("raw"), kind=kind, shards=2)
    shard = sorted(raw.glob(f"*-00002-of-*.{kind}"))[0]
    os.truncate(shard, int(shard.stat().st_size * keep))
    fails(rf"--path-raw .*{shard.name} cannot be read: (truncated|not a)", make, raw, TUNED, tmp_path / "new")


def test_a_git_lfs_pointer(tmp_path):
    raw = save(tmp_path / "raw", golden("raw"))
    (raw / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails("model.safetensors cannot be read: a Git LFS pointer", make, raw, TUNED, tmp_path / "new")


def test_a_pickle_with_code_is_not_opened(tmp_path):
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    raw = save(tmp_path / "raw", golden("raw"), kind="bin")
    torch.save({"weight": Code()}, raw / "pytorch_model.bin")
    fails("holds other things than weights", make, raw, TUNED, tmp_path / "new")
    (raw / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    fails("not a zip file of torch.save", make, raw, TUNED, tmp_path / "new")
    torch.save([torch.ones(3)], raw / "pytorch_model.bin")
    fails("does not hold tensors by name", make, raw, TUNED, tmp_path / "new")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors"])
def test_an_index_that_names_a_file_outside(tmp_path, diff, file):
    save(tmp_path / "other", golden("raw"))
    raw = save(tmp_path / "raw", golden("raw"), shards=2)
    index = json.loads((raw / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = file
    (raw / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(f"names a file outside of the directory: .{file}", make, raw, TUNED, tmp_path / "new")
    content = json.loads((diff / manifest.MANIFEST).read_text())
    content["tensors"]["lm_head.weight"]["file"] = file
    write_manifest(diff, content)
    fails(f"names a file outside of the directory: .{file}", recover, RAW, diff, tmp_path / "out")


def test_an_index_that_promises_a_tensor_no_file_has(tmp_path):
    raw = save(tmp_path / "raw", golden("raw"), shards=2)
    index = json.loads((raw / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.more.weight"] = "model-00001-of-00002.safetensors"
    (raw / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("lacks model.more.weight", make, raw, TUNED, tmp_path / "new")
    (raw / "model.safetensors.index.json").write_text("{}")
    fails("no weight_map", make, raw, TUNED, tmp_path / "new")
    (raw / "model.safetensors.index.json").write_text("{")
    fails("model.safetensors.index.json cannot be read: not JSON", make, raw, TUNED, tmp_path / "new")
    (raw / "model.safetensors.index.json").unlink()
    fails("model-00001-of-00002.safetensors is there, but no index", make, raw, TUNED, tmp_path / "new")


@pytest.mark.parametrize("spoil", ["truncate", "flip", "drop manifest", "drop shard", "other version", "other shape"])
def test_a_damaged_difference(tmp_path, diff, spoil):
    shard = diff / json.loads((diff / manifest.MANIFEST).read_text())["tensors"]["lm_head.weight"]["file"]
    content = json.loads((diff / manifest.MANIFEST).read_text())
    if spoil == "truncate":
        os.truncate(shard, shard.stat().st_size - 1)
        match = f"{shard.name} cannot be read: truncated"
    elif spoil == "flip":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        match = "is damaged, it gives another sha256"
    elif spoil == "drop manifest":
        shutil.copy(diff / "diff-00001-of-00006.safetensors", diff / "model.safetensors")
        (diff / manifest.MANIFEST).unlink()
        match = "landmark_diff.json is missing"
    elif spoil == "drop shard":
        shard.unlink()
        match = f"{shard.name} is missing"
    elif spoil == "other version":
        (diff / manifest.MANIFEST).write_text(json.dumps(content | {"version": 3}))
        match = "'landmark-weight-diff' version 3, where .* version 2 was expected"
    else:
        content["tensors"]["model.norm.weight"] |= {"shape": [65], "raw": {"name": "x", "shape": [66], "sha256": ""}}
        (diff / manifest.MANIFEST).write_text(json.dumps(content))
        match = "landmark_diff.json cannot be read: it was changed after it was written"
    fails(match, recover, RAW, diff, tmp_path / "out")


def test_directories_that_are_none(tmp_path, monkeypatch):
    fails("there is no such directory", make, tmp_path / "nowhere", TUNED, tmp_path / "new", kind=UsageError)
    fails("this is a file", make, RAW / "config.json", TUNED, tmp_path / "new", kind=UsageError)
    (tmp_path / "empty").mkdir()
    fails("has no config.json", make, tmp_path / "empty", TUNED, tmp_path / "new")
    (tmp_path / "empty" / "config.json").write_text("{}")
    fails("no weights found", make, tmp_path / "empty", TUNED, tmp_path / "new")


# Where the result goes


def test_a_directory_that_is_not_empty_needs_overwrite(tmp_path):
    out = save(tmp_path / "out", golden("raw"))
    with pytest.raises(UsageError, match="not empty; --overwrite"):
        recover(RAW, AUTHORS_DIFF, out)
    assert_same_bits(load(out), golden("raw"))
    (out / "notes").mkdir()
    recover(RAW, AUTHORS_DIFF, out, overwrite=True)
    assert_same_bits(load(out), golden("tuned"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (out / "notes").exists()


def test_a_failure_leaves_what_was_to_be_overwritten(tmp_path):
    out = save(tmp_path / "out", golden("raw"))
    with pytest.raises(LandmarkError, match="the sum"):
        recover(save_shifted(tmp_path), AUTHORS_DIFF, out, overwrite=True)
    assert_same_bits(load(out), golden("raw"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "shifted"]


def test_overwrite_replaces_only_models_and_never_what_is_read(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    raw = save(tmp_path / "models" / "raw", golden("raw"))
    (tmp_path / "models" / "config.json").write_text("{}")
    cases = {tmp_path / "home": "not a model directory", raw: "would be lost", raw.parent: "would be lost"}
    for out, match in cases.items():
        with pytest.raises(UsageError, match=match):
            recover(raw, AUTHORS_DIFF, out, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()
    assert_same_bits(load(raw), golden("raw"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="this is a file"):
        recover(raw, AUTHORS_DIFF, tmp_path / "file", overwrite=True)


def test_an_empty_directory_is_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    assert_same_bits(load(recover(RAW, AUTHORS_DIFF, tmp_path / "out")), golden("tuned"))


def test_two_runs_do_not_write_the_same_directory(tmp_path):
    with output.new_directory(tmp_path / "out", "--path-tuned", overwrite=False, keep=()):
        with pytest.raises(LandmarkError, match="another landmark command is writing"):
            recover(RAW, AUTHORS_DIFF, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_something_else_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is in the way"):
        recover(RAW, AUTHORS_DIFF, tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "thesis.tex").exists()


def test_a_disk_that_is_too_small_is_seen_before_starting(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 300_000, 300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    match = r"takes 543\.\d kB, but only 300\.0 kB are free at"
    fails(match, recover, RAW, AUTHORS_DIFF, tmp_path / "deep" / "er" / "out")
    assert not (tmp_path / "deep").exists()
    fails(match, make, RAW, TUNED, tmp_path / "new")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "fdatasync"])
def test_a_disk_that_becomes_full(tmp_path, monkeypatch, call):
    calls = []
    real = getattr(os, call)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > (5 if call == "pwrite" else 0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(output, "FLUSH_BYTES", 1)
    monkeypatch.setattr(os, call, full)
    fails("the disk became full; nothing was left", recover, RAW, AUTHORS_DIFF, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "5", "many", "0GB", "-1GB", "5PB", "9" * 400 + "GB", "1e400GB", "nan", "inf"])
def test_sizes(text):
    if text == "5":
        assert [parse_size(size) for size in (text, "5gb", "1.5 MB", "2K")] == [5, 5 * 10**9, 1_500_000, 2000]
    else:
        with pytest.raises(UsageError, match="--max-shard-size: expected a size"):
            parse_size(text)
