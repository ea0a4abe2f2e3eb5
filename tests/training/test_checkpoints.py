"""Checkpoints: whole or absent, the newest kept, never another run's."""

import json
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from landmark_cli.errors import LandmarkError
from landmark_cli.training.checkpoints import Checkpoints, plain_name
from landmark_cli.training.checksums import damage_of, write_checksums
from tests.training.tiny import tiny_loop, tiny_model


@contextmanager
def files_no_larger_than(size):
    """Writing more into a file fails, as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def saved(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_the_newest_are_kept(tmp_path):
    tiny_loop(tmp_path, steps=5, save_every=1, keep=3).run()
    assert saved(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]


def test_a_checkpoint_half_removed_is_none(tmp_path, monkeypatch):
    def killed(path, **_):
        if path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    loop = tiny_loop(tmp_path, steps=3, save_every=1, keep=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        loop.run()
    assert [name for name in saved(tmp_path) if name.endswith(".partial")] == ["step-00000001.old.partial"]
    again = tiny_loop(tmp_path, steps=3, save_every=1, keep=2)
    assert again.resume() and again.step == 3
    assert saved(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_run_that_was_killed_before_the_oldest_was_removed_removes_it(tmp_path, monkeypatch):
    loop = tiny_loop(tmp_path, steps=3, save_every=1, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_remove", lambda *_: None)
        loop.run()
    assert len(saved(tmp_path)) == 3
    assert tiny_loop(tmp_path, steps=3, save_every=1, keep=2).resume()
    assert saved(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("size", [100, 40_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, size):
    loop = tiny_loop(tmp_path, steps=1)
    loop.run()
    good = loop.checkpoints.save(2)
    before = load_file(good / "model.safetensors")
    with files_no_larger_than(size), pytest.raises(LandmarkError) as raised:
        loop.checkpoints.save(4)
    message = str(raised.value)
    assert "the checkpoint of step 4 could not be saved" in message and ".cc" not in message
    assert ("File too large" if size == 100 else "written to its end") in message
    assert f"The last good one is {good}" in message and "--resume" in message
    assert saved(tmp_path) == ["step-00000002"]
    assert loop.resume() and loop.step == 2
    assert load_file(good / "model.safetensors").keys() == before.keys()


def test_a_checkpoint_cut_short_is_not_seen(tmp_path):
    loop = tiny_loop(tmp_path)
    loop.checkpoints.save(2)
    left_over = tmp_path / "checkpoints" / "step-00000004.partial"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    assert loop.checkpoints.newest().name == "step-00000002"
    loop.checkpoints.save(6)
    assert saved(tmp_path) == ["step-00000002", "step-00000006"]


def test_another_models_checkpoint_is_refused(tmp_path):
    tiny_loop(tmp_path, identity={"n_layer": 2, "seed": 0}).checkpoints.save(2)
    other = tiny_loop(tmp_path, identity={"n_layer": 3, "seed": 0})
    with pytest.raises(LandmarkError, match=r"belongs to another run: n_layer is 2 there and 3 here\. Give"):
        other.resume()


def test_weights_of_another_shape_are_refused(tmp_path):
    tiny_loop(tmp_path).checkpoints.save(2)
    with pytest.raises(LandmarkError, match="holds the weights of another model: wrapped.model.layers.0.attention"):
        tiny_loop(tmp_path, model=tiny_model(bias=True)).resume()


def flip(path, place=-3):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 16
    path.write_bytes(data)


FILES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "training.json", "checksums.sha256"]


def test_every_file_of_a_checkpoint_has_a_checksum(tmp_path):
    path = tiny_loop(tmp_path).checkpoints.save(2)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    shown = subprocess.run(["sha256sum", "-c", "checksums.sha256"], cwd=path, capture_output=True, text=True).stdout
    assert shown.splitlines() == [f"{name}: OK" for name in sorted(FILES) if name != "checksums.sha256"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, name, damage):
    if (name, damage) == ("checksums.sha256", "gone"):
        pytest.skip("this is a checkpoint of an earlier version")
    loop = tiny_loop(tmp_path)
    first, second, third = (loop.checkpoints.save(step) for step in (2, 3, 4))
    assert not first.exists()
    file = third / name
    if damage == "flipped":
        flip(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(LandmarkError, match=rf"step-00000004 is damaged \(.*{name}.*remove it to go on from the one"):
        loop.checkpoints.load(third)
    assert loop.resume() and loop.step == 3
    shown = capsys.readouterr().err
    assert f"{third} is damaged" in shown and name in shown and f"going on from {second.name}" in shown
    assert saved(tmp_path) == ["step-00000003", "step-00000004.damaged"]
    loop.checkpoints.save(4)
    assert loop.resume() and loop.step == 4


def test_a_file_that_no_checksum_names_is_damage(tmp_path):
    path = tiny_loop(tmp_path).checkpoints.save(2)
    lines = (path / "checksums.sha256").read_text().splitlines(keepends=True)
    (path / "checksums.sha256").write_text("".join(lines[:-1]))
    assert damage_of(path) == "checksums.sha256 does not name training.json"
    (path / ".nfs0001").write_bytes(b"another program's")
    (path / "checksums.sha256").write_text("".join(lines))
    assert damage_of(path) is None


def test_where_all_are_damaged_the_run_is_refused_and_nothing_put_aside(tmp_path):
    loop = tiny_loop(tmp_path)
    for step in (2, 3):
        flip(loop.checkpoints.save(step) / "optimizer.bin")
    for _ in range(2):
        with pytest.raises(LandmarkError, match=r"all checkpoints in .* are damaged \(step-00000003: optimizer.bin"):
            loop.resume()
    assert saved(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_of_an_earlier_version_is_taken_as_it_is(tmp_path, capsys):
    path = tiny_loop(tmp_path).checkpoints.save(2)
    (path / "checksums.sha256").unlink()
    record = json.loads((path / "training.json").read_text())
    del record["skipped"]
    (path / "training.json").write_text(json.dumps(record))
    loop = tiny_loop(tmp_path)
    assert loop.resume() and loop.step == 2
    assert "has no checksums.sha256, so nothing can be said of damage to it" in capsys.readouterr().err


def test_what_no_checksum_shows_is_named_too(tmp_path):
    loop = tiny_loop(tmp_path)
    path = loop.checkpoints.save(2)
    (path / "optimizer.bin").write_bytes(b"damaged")
    write_checksums(path)
    with pytest.raises(LandmarkError, match="step-00000002 cannot be read: .*; remove it to go on from the one before"):
        loop.resume()
    (path / "training.json").write_text("{}")
    write_checksums(path)
    with pytest.raises(LandmarkError, match="training.json cannot be read: it lacks step; remove the checkpoint"):
        loop.resume()


def test_nothing_to_resume_is_no_error(tmp_path):
    loop = tiny_loop(tmp_path)
    assert not loop.resume() and loop.step == 0


def test_names_lose_what_wrappers_add():
    wrapped = "_orig_mod.module._fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp.weight"
    assert plain_name(wrapped) == "model.layers.0.mlp.weight"
    assert plain_name("model.modules_to_save.weight") == "model.modules_to_save.weight"


def test_the_record_says_what_the_run_is(tmp_path):
    path = tiny_loop(tmp_path, identity={"seed": 3, "data": ("a",)}).checkpoints.save(2)
    record = {"step": 2, "identity": {"seed": 3, "data": ["a"]}, "layout": "whole weights", "skipped": {}}
    assert json.loads((path / "training.json").read_text()) == record


def test_a_disk_with_little_room_is_pointed_out_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    tiny_loop(tmp_path, steps=1).run()
    assert "GB left" not in capsys.readouterr().err
    tiny_loop(tmp_path, steps=1, save_every=1).run()
    assert "has 0.0 GB left; the checkpoints of this run need about" in capsys.readouterr().err
