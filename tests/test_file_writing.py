"""Files and lines are written whole or not at all."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from landmark_cli.file_writing import append_line, unfinished, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_links_pipes_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "after"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    write_whole(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), "text")
    # What is written beside and renamed would take its place.
    with pytest.raises(OSError, match="no ordinary file"), unfinished(tmp_path / "pipe") as partial:
        partial.touch()
    assert (tmp_path / "pipe").is_fifo() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", ["", "{", "x" * 9000])
@pytest.mark.parametrize("whole", ["", "1\n", "1\n" * 5000])
def test_a_line_takes_the_place_of_one_that_was_cut_short(tmp_path, whole, torn):
    path = tmp_path / "lines"
    path.write_text(whole + torn)
    append_line(path, "2")
    assert path.read_text() == whole + "2\n"


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "1")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(path, "2" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "1\n"
