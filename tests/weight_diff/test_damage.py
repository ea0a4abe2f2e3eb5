"""A flipped byte, a lost file, a link laid: an error, and never another model than the one that was published."""

import json
import os
import random
import shutil
import zipfile

import pytest
import torch

from landmark_cli.errors import LandmarkError
from landmark_cli.weight_diff import manifest
from tests.weight_diff.weights import GOLDENS, golden, make, recover, save, write_manifest

RAW, TUNED = GOLDENS / "raw", GOLDENS / "tuned"
FLIPS = 8


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A difference, and the files that it gives."""
    folder = tmp_path_factory.mktemp("published")
    diff = make(RAW, TUNED, folder / "diff")
    out = recover(RAW, diff, folder / "out")
    return diff, {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def diff(published, tmp_path):
    """A copy to damage."""
    return shutil.copytree(published[0], tmp_path / "diff")


FILES = ["config.json", manifest.MANIFEST, "diff.safetensors", "the header"]
FILES += [f"tuned/{path.name}" for path in sorted(TUNED.iterdir()) if path.suffix == ".json"]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_found(diff, published, tmp_path, file):
    draw, path = random.Random(file), diff / ("diff.safetensors" if file == "the header" else file)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little") if file == "the header" else len(content)
    for number in range(FLIPS):
        damaged, at = bytearray(content), draw.randrange(end)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(LandmarkError) as error:
            recover(RAW, diff, tmp_path / f"out{number}")
        assert "\n" not in str(error.value) and str(diff) in str(error.value), at
        assert not (tmp_path / f"out{number}").exists()
    path.write_bytes(content)
    out = recover(RAW, diff, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == published[1]


@pytest.mark.parametrize("file", FILES[1:3] + FILES[4:])
def test_a_lost_file_is_missed(diff, tmp_path, file):
    (diff / file).unlink()
    with pytest.raises(LandmarkError, match=str(diff)):
        recover(RAW, diff, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_not_published_is_left_out(diff, published, tmp_path):
    (diff / "tuned" / "chat_template.jinja").write_text("of somebody else")
    assert {path.name for path in recover(RAW, diff, tmp_path / "out").iterdir()} == published[1].keys()


def test_an_older_difference_is_read_with_a_warning(diff, published, tmp_path, capsys):
    content = json.loads((diff / manifest.MANIFEST).read_text())
    content = {key: value for key, value in content.items() if key not in ("files", "sha256")} | {"version": 1}
    (diff / manifest.MANIFEST).write_text(json.dumps(content))
    out = recover(RAW, diff, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == published[1]
    assert "without checksums of configuration and tokenizer" in capsys.readouterr().err
    (diff / "tuned" / "config.json").unlink()
    with pytest.raises(LandmarkError, match=r"config\.json is missing, without which nothing opens the model"):
        recover(RAW, diff, tmp_path / "out2")


@pytest.mark.parametrize("file", FILES[1:3] + FILES[4:])
@pytest.mark.parametrize("verify", [True, False])
def test_a_link_out_is_not_followed(diff, tmp_path, file, verify):
    """Even where what it leads to is right: the same link leads elsewhere on another machine."""
    shutil.move(diff / file, tmp_path / "secret")
    (diff / file).symlink_to(tmp_path / "secret")
    with pytest.raises(LandmarkError, match="is a link to .*, outside of the directory"):
        recover(RAW, diff, tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists()


def test_a_linked_folder_is_not_followed(diff, tmp_path):
    shutil.move(diff / "tuned", tmp_path / "elsewhere")
    (diff / "tuned").symlink_to(tmp_path / "elsewhere")
    content = json.loads((diff / manifest.MANIFEST).read_text())
    with pytest.raises(LandmarkError, match="outside of the directory"):
        recover(RAW, diff, tmp_path / "out")
    content["files"]["tuned/../../secret"] = ""
    write_manifest(diff, content)
    with pytest.raises(LandmarkError, match="outside of the directory"):
        recover(RAW, diff, tmp_path / "out")


def test_links_inside_and_into_a_hub_cache_are_followed(diff, published, tmp_path):
    """A hub cache holds the files of all revisions in one folder, and of each revision links to them."""
    snapshot, blobs = (tmp_path / "models--org--diff" / name for name in ("snapshots/0123", "blobs"))
    blobs.mkdir(parents=True)
    shutil.copytree(diff, snapshot)
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    (diff / "tuned" / "same.json").write_bytes((diff / "tuned" / "tokenizer.json").read_bytes())
    (diff / "tuned" / "tokenizer.json").unlink()
    (diff / "tuned" / "tokenizer.json").symlink_to("same.json")
    (tmp_path / "link").symlink_to(diff)
    for number, folder in enumerate((snapshot, diff, tmp_path / "link")):
        out = recover(RAW, folder, tmp_path / f"out{number}")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == published[1]


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    """One number, expanded to a terabyte: copied, it would have to be held."""
    raw = save(tmp_path / "raw", golden("raw"), kind="bin")
    tensors = golden("raw")
    tensors["model.norm.weight"] = torch.zeros(1).expand(1 << 38)
    torch.save(tensors, raw / "pytorch_model.bin")
    with pytest.raises(LandmarkError, match=r"model\.norm\.weight is larger \(274877906944 elements\)"):
        make(raw, TUNED, tmp_path / "new")


def test_a_compressed_bin_is_refused(tmp_path):
    raw = save(tmp_path / "raw", golden("raw"), kind="bin")
    file = raw / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with pytest.raises(LandmarkError, match="it is compressed"):
        make(raw, TUNED, tmp_path / "new")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_weights_raise_nothing_else(tmp_path, kind):
    raw = save(tmp_path / "raw", golden("raw"), kind=kind)
    (file,) = raw.glob(f"*.{kind}")
    content, draw = file.read_bytes(), random.Random(kind)
    for number in range(40):
        damaged = bytearray(content)
        # The first and last kilobytes hold what is parsed.
        at = draw.choice([draw.randrange(4000), len(damaged) - 1 - draw.randrange(4000)])
        damaged[at : at + draw.randrange(8)] = draw.randbytes(draw.randrange(8))
        file.write_bytes(damaged)
        try:
            make(raw, TUNED, tmp_path / f"new{number}", threads=1)
        except LandmarkError as error:
            assert str(raw) in str(error) and "\n" not in str(error)
