"""What stays on a disk is as open to others as its owner wants it."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from landmark_cli import on_disk


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_stays_is_as_open_to_others_as_the_umask_says(tmp_path, monkeypatch, umask):
    """safetensors lets nobody else read its files; a file of another mode was given that by somebody."""
    on_disk._mode_of_new_files.cache_clear()
    before = os.umask(umask)
    try:
        (tmp_path / "folder").mkdir()
        save_file({"x": torch.zeros(1)}, tmp_path / "folder" / "model.safetensors")
        for name, mode in (("owner", 0o600), ("public", 0o644), ("readable", 0o400), ("program", 0o700)):
            (tmp_path / name).touch()
            (tmp_path / name).chmod(mode)
        on_disk.flush_tree(tmp_path)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
        on_disk._mode_of_new_files.cache_clear()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    new = 0o666 & ~umask
    assert modes == {"model.safetensors": new, "owner": new, "public": 0o644, "readable": 0o400, "program": 0o700}
    monkeypatch.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no modes here")))
    (tmp_path / "again").touch(mode=0o600)
    on_disk.flush_tree(tmp_path)
