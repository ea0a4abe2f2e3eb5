"""Checkpoints: whole or absent, the newest kept, never another run's."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from landmark_cli.errors import LandmarkError
from landmark_cli.training.checkpoints import plain_name
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


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, size):
    loop = tiny_loop(tmp_path)
    good = loop.checkpoints.save(2)
    before = load_file(good / "model.safetensors")
    with files_no_larger_than(size), pytest.raises(LandmarkError) as raised:
        loop.checkpoints.save(4)
    message = str(raised.value)
    assert "the checkpoint of step 4 could not be saved" in message
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


def test_a_damaged_checkpoint_is_named(tmp_path):
    loop = tiny_loop(tmp_path)
    path = loop.checkpoints.save(2)
    (path / "optimizer.bin").write_bytes(b"damaged")
    with pytest.raises(LandmarkError, match="step-00000002 cannot be read"):
        loop.resume()
    (path / "training.json").unlink()
    with pytest.raises(LandmarkError, match="is no checkpoint of a training run"):
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
    record = {"step": 2, "identity": {"seed": 3, "data": ["a"]}, "layout": "whole weights"}
    assert json.loads((path / "training.json").read_text()) == record


def test_a_disk_with_little_room_is_pointed_out_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    tiny_loop(tmp_path, steps=1).run()
    assert "GB left" not in capsys.readouterr().err
    tiny_loop(tmp_path, steps=1, save_every=1).run()
    assert "has 0.0 GB left; the checkpoints of this run need about" in capsys.readouterr().err
