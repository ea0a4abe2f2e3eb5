"""Whatever a parser or a disk throws is one line that names the file."""

import errno

import pytest
from safetensors import SafetensorError

from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading, writing


class PanicException(BaseException):
    """As pyo3's, which is no Exception."""


def raised() -> list[BaseException]:
    return [
        KeyError("a"),
        TypeError("x\ny"),
        OverflowError(),
        RecursionError(),
        MemoryError(),
        EOFError(),
        RuntimeError("z" * 10_000),
        PanicException("index out of bounds"),
        OSError(errno.EIO, "Input/output error"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ]


@pytest.mark.parametrize("error", raised(), ids=lambda error: type(error).__name__)
def test_whatever_a_parser_throws_is_one_short_line(error):
    with pytest.raises(LandmarkError) as found, reading("model/config.json", "--model", to_do="get it again"):
        raise error
    message = str(found.value)
    assert message.startswith("--model model/config.json cannot be read: ") and message.endswith("; get it again")
    assert "\n" not in message and len(message) < 400


def test_what_a_line_announces_is_said_too():
    said = "It is none of: \n(1) a file, \n(2) a folder."
    with pytest.raises(LandmarkError, match=r"read: It is none of: \(1\) a file, \(2\) a folder\.$"), reading("it"):
        raise ValueError(said)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, LandmarkError])
@pytest.mark.parametrize("around", [reading, writing])
def test_interruptions_and_our_own_errors_pass(around, error):
    with pytest.raises(error), around("file"):
        raise error


WRITE_FAILURES = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; choose a place"),
    "no folder": (FileNotFoundError(errno.ENOENT, "No such file or directory"), "make its folder first"),
    "safetensors": (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "written: No space left on device; make room",
    ),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "inline_container"),
}


@pytest.mark.parametrize(("error", "message"), WRITE_FAILURES.values(), ids=WRITE_FAILURES)
def test_what_a_disk_refuses_is_one_line_with_the_path(error, message):
    with pytest.raises(LandmarkError, match=message) as found, writing("out/file"):
        raise error
    assert str(found.value).startswith("out/file cannot be written: ")
