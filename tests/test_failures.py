"""How a command ends that fails: what is said, by which process, and the exit code."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from landmark_cli import cli, console, failures
from landmark_cli.commands.evaluate import PassKeyOptions
from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.commands.prepare import PrepareOptions
from landmark_cli.commands.ruler import RulerOptions
from landmark_cli.commands.train import TrainOptions
from landmark_cli.errors import LandmarkError, Stopped, UsageError
from landmark_cli.failures import memory_savers
from landmark_cli.interrupts import Interrupted
from landmark_cli.memory import asked_for, is_out_of_memory
from landmark_cli.options import settings_of
from tests.greet import greet_command
from tests.training.command import CHECKOUT, environment

FULL = OSError(errno.ENOSPC, "No space left on device", "rows.jsonl")
# What a command raises: the exit code and what is said of it.
RAISED = [
    (LandmarkError("no such person; name somebody"), 1, "error: no such person; name somebody"),
    (UsageError("--loud: not together with --twice"), 2, "error: --loud: not together with --twice"),
    (Stopped("kept; go on with: landmark greet", signal.SIGTERM), 143, "kept; go on with: landmark greet"),
    (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM"),
    (EOFError("Compressed file ended"), 1, "error: EOFError: Compressed file ended"),
    (EOFError(), 1, "error: EOFError"),
    (FULL, 1, "error: rows.jsonl: No space left on device; make room on the disk"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "error: OSError: [Errno 28] No space left on device"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 1, "error: x: File name too long; choose a shorter name"),
    (MemoryError(), 1, "error: out of memory; use a machine that has more"),
    (
        FileNotFoundError(errno.ENOENT, "No such file", "out of memory"),
        1,
        "error: out of memory: No such file; make its folder first",
    ),
    (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), 1, "error: a -> b: Invalid link"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: BrokenPipeError: [Errno 32] Broken pipe"),
    (ValueError("one\ntwo"), 1, "error: ValueError: one"),
    (RuntimeError(), 1, "error: RuntimeError"),
    (type("PanicException", (BaseException,), {})("in Rust"), 1, "error: PanicException: in Rust"),
]
HINT = "run again with --debug for the traceback"


@pytest.fixture
def greet(monkeypatch, capsys):
    """Run `landmark greet ...` whose work raises an error: exit code, stderr."""
    console.console.cache_clear()

    def call(error, *arguments):
        def run(options):
            raise error

        monkeypatch.setattr(cli, "COMMANDS", [greet_command(run)])
        with pytest.raises(SystemExit) as exit:
            cli.main(["greet", *arguments])
        out, err = capsys.readouterr()
        assert out == ""
        return exit.value.code, err

    yield call
    console.console.cache_clear()


@pytest.mark.parametrize(("error", "code", "message"), RAISED, ids=[type(error).__name__ for error, *_ in RAISED])
def test_every_error_is_told_and_none_is_taken_for_typers_own(greet, error, code, message):
    found, err = greet(error)
    of_a_file = isinstance(error, OSError) and error.filename is not None
    foreseen = of_a_file or isinstance(error, (LandmarkError, KeyboardInterrupt, MemoryError))
    assert (found, err.splitlines()) == (code, [message] if foreseen else [message, HINT])
    found, err = greet(error, "--debug")
    assert found == code and message in err and HINT not in err
    assert ("Traceback" in err) is not isinstance(error, (Stopped, KeyboardInterrupt))


def no_memory(*shape: int) -> list[tuple[str, BaseException]]:
    """What numpy and torch raise here where they are asked for an array that no machine holds."""
    raised = []
    for library in (np, torch):
        try:
            library.ones(shape)
        except BaseException as error:
            raised.append((library.__name__, error))
    return raised


MEMORY = [
    *no_memory(1 << 45),
    ("python", MemoryError()),
    ("system", OSError(errno.ENOMEM, "Cannot allocate memory")),
    (
        "cuda",
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
        ),
    ),
    ("cublas", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    ("accelerator", RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in")),
    ("safetensors", Exception("Error while deserializing header: Cannot allocate memory (os error 12)")),
]


@pytest.mark.parametrize("error", [error for _, error in MEMORY], ids=[name for name, _ in MEMORY])
def test_memory_that_ran_out_is_one_line_and_says_what_needs_less(error):
    assert is_out_of_memory(error)
    line = failures.describe(error, TrainOptions())
    assert line.startswith("out of GPU memory" if "CUDA" in str(error) else "out of memory")
    assert "; what takes less: a shorter --sequence-length, fewer --n-layer" in line and "\n" not in line
    assert "use a machine that has more" in failures.describe(error, PrepareOptions())


def test_how_much_was_asked_for_is_said():
    said = {name: asked_for(error) for name, error in MEMORY}
    assert said["cuda"] == "GPU memory (20.00 GiB more were asked for)"
    assert said["numpy"] == "memory (256 TiB more were asked for)"
    assert said["torch"] == "memory (131072.00 GiB more were asked for)"
    assert said["python"] == "memory" and said["cublas"] == "GPU memory"


OTHERS = [error for error, *_ in RAISED if not isinstance(error, MemoryError)]


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_are_not_about_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.words)
def test_what_saves_memory_is_named_as_the_command_line_takes_it(command):
    for setting in settings_of(command.options_class).values():
        saves = setting.metadata["saves_memory"]
        # A flag that is on saves memory where it is taken back.
        label = setting.label.replace("--", "--no-", 1) if setting.default is True else setting.label
        assert not saves or label in saves


def test_only_what_is_left_to_save_is_named():
    finetune = {"model": "m", "data": ["d"]}
    saving = {"batch_size": 1, "gradient_checkpointing": True, "lora_rank": 1, "four_bit": True, "landmark_freq": 9}
    first = memory_savers(FinetuneOptions(**finetune))
    left = memory_savers(FinetuneOptions(**finetune, **saving))
    assert any("--gradient-checkpointing" in way for way in first) and any("--batch-size" in way for way in first)
    assert left and not any(f"--{name.replace('_', '-')}" in way for way in left for name in saving)


@pytest.mark.parametrize("options", [RulerOptions, PassKeyOptions], ids=lambda options: options.__name__)
def test_a_number_that_falls_by_itself_is_named_where_it_was_given(options):
    ways = {number: memory_savers(options(batch_size=number)) for number in (None, 1, 2)}
    assert ways[None] == ways[1] and set(ways[2]) - set(ways[1]) == {"a smaller --batch-size"}


def test_of_several_numbers_the_largest_can_be_smaller():
    lengths = {
        several: memory_savers(RulerOptions(lengths=list(several))) for several in ((4096, 1), (1, 1), (1000000,))
    }
    assert lengths[4096, 1] == lengths[1000000,] == [*lengths[1, 1], "shorter --lengths"]


PIPED = """
import sys
from landmark_cli import cli, console
from tests.greet import GreetOptions, greet_command

def run(options):
    for _ in range(100_000):
        {write}

cli.COMMANDS[:] = [greet_command(run)]
cli.main(["greet"])
"""
WRITERS = ["console.write_out('text\\n')", "console.table(['a'], [['text']])", "console.print_json({'a': 'text'})"]


def python(code: str, shell: str = '"$@"', **options) -> subprocess.CompletedProcess:
    """Run Python code in a process that a shell line starts as "$@"."""
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CHECKOUT, **options)


@pytest.mark.parametrize("write", WRITERS, ids=["text", "table", "json"])
def test_a_reader_that_goes_away_is_no_error_to_speak_of(write):
    done = python(PIPED.format(write=write), '"$@" | head -n 1')
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("write", WRITERS, ids=["text", "table", "json"])
def test_a_full_disk_behind_standard_output_is_told(write):
    done = python(PIPED.format(write=write), '"$@" > /dev/full')
    assert done.returncode == 1
    assert done.stderr == ("error: standard output cannot be written: No space left on device; make room on the disk\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(closed):
    code = PIPED.format(write="console.write_out('x'); console.info('y'); console.table(['a'], [])").replace(
        "100_000", "3"
    )
    assert python(code, f'"$@" {closed}').returncode == 0


def test_any_path_can_be_printed():
    write = "path = '\\udcff.txt'; console.table(['a'], [[path]]); console.info(path)"
    done = python(PIPED.format(write=write).replace("100_000", "1"))
    assert done.returncode == 0, done.stderr
    assert "\\udcff" in done.stdout and "\\udcff" in done.stderr


LAUNCHED = """
from landmark_cli import cli
from tests.greet import GreetOptions, greet_command

def run(options):
    raise MemoryError

cli.COMMANDS[:] = [greet_command(run)]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: out of memory; use a machine"),
        (["--times", "0"], "error: --times: must be at least 1"),
        (["--tims", "3"], "No such option: --tims"),
        (["--help"], "Greet somebody [loudly]."),
    ],
    ids=["memory", "range", "typo", "help"],
)
def test_a_launch_of_two_says_it_once(tmp_path, arguments, said):
    (tmp_path / "greet.py").write_text(LAUNCHED)
    command = ["torchrun", "--standalone", "--nproc_per_node=2", str(tmp_path / "greet.py"), "greet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == int("--help" not in arguments)
    assert (done.stdout + done.stderr).count(said) == 1, done.stderr
