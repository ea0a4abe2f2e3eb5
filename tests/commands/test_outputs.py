"""Files that a command writes at its end: what cannot be written is said before the work, by its option and path."""

import builtins
import errno
import io
import os
import re
from dataclasses import MISSING
from pathlib import Path

import pytest

from landmark_cli import cli, console
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.evaluation.pictures import save_picture
from landmark_cli.evaluation.report import write_tables
from landmark_cli.evaluation.studies import FinishedRows, Study
from landmark_cli.file_errors import writing
from landmark_cli.file_writing import check_writable, write_whole
from landmark_cli.inference.trace import GenerationTrace, write_trace
from landmark_cli.options import check_outputs, save_recipe, settings_of
from landmark_cli.training.metrics_file import MetricsFile
from tests.greet import GreetOptions

OUTPUTS = {
    f"{command.words} {setting.label}": (command, setting)
    for command in cli.COMMANDS
    for setting in settings_of(command.options_class).values()
    if setting.metadata["is_output"]
}
REQUIRED = {
    "eval study": ["table1", "--role=landmark=runs/landmark"],
    "generate": ["--prompt=x"],
    "plot": ["runs/landmark"],
}
PLACES = {
    "a folder": ("", "Is a directory; name a file"),
    "below a file": ("file/x.png", "(Not a directory|File exists); a file stands where a folder is needed"),
    "a name too long": ("x" * 300, "File name too long; choose a shorter name"),
    "a folder of the system's": ("/proc/x.png", "there is no such file|No such file"),
}


@pytest.mark.parametrize("name", ["json", "trace", "plot"])
def test_every_such_option_is_marked(name):
    marked = {setting.name for _, setting in OUTPUTS.values()}
    assert name in marked
    for command in cli.COMMANDS:
        setting = settings_of(command.options_class).get(name)
        assert setting is None or setting.kind is bool or setting.metadata["is_output"]


@pytest.mark.parametrize("option", OUTPUTS)
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_written_is_said_before_the_work(landmark, tmp_path, monkeypatch, option, place):
    command, setting = OUTPUTS[option]
    words = command.words
    where, message = PLACES[place]
    (tmp_path / "file").write_text("here before")
    path = str(tmp_path / where) if not where.startswith("/") else where
    for name in ("commands.generate", "commands.evaluate", "commands.longppl", "commands.ruler", "commands.study_rows"):
        monkeypatch.setattr(f"landmark_cli.{name}.open_model", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr("landmark_cli.data.prepare.prepare", lambda *_, **__: pytest.fail("work was begun"))
    result = landmark(*words.split(), *REQUIRED.get(words, []), f"--{setting.key}", path)
    assert (result.code, result.out) == (1, "")
    said = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(f"error: {setting.label} {path} cannot be written: "), result.err
    assert (tmp_path / "file").read_text() == "here before"


@pytest.mark.parametrize("message", PLACES.values(), ids=PLACES)
def test_trying_says_what_writing_would_say(tmp_path, message):
    where, expected = message
    (tmp_path / "file").write_text("")
    path = tmp_path / where
    with pytest.raises(LandmarkError, match=expected):
        check_writable(path, "--json")
    with pytest.raises(LandmarkError), writing(path, "--json"):
        write_whole(path, "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_permissions_are_looked_at(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(LandmarkError, match="Permission denied; change its permissions"):
        check_writable(tmp_path / "closed" / "x.json")


def test_trying_leaves_nothing_and_changes_nothing(tmp_path):
    (tmp_path / "there").write_text("before")
    os.mkfifo(tmp_path / "pipe")
    for name in ("there", "new", "pipe"):
        check_writable(tmp_path / name)
    check_writable("/dev/stdout")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "there"]
    assert (tmp_path / "there").read_text() == "before"


@pytest.mark.parametrize(("words", "other"), [("generate", "trace"), ("eval passkey", "plot")])
def test_two_outputs_are_two_files(landmark, tmp_path, words, other):
    same = [f"--json={tmp_path / 'out.png'}", f"--{other}={tmp_path / 'sub/../out.png'}"]
    result = landmark(*words.split(), *REQUIRED.get(words, []), *same)
    assert result.code == 2 and f"--json and --{other} name the same file" in result.err


BESIDE = [
    (option, other.name)
    for option, (command, _) in OUTPUTS.items()
    for other in settings_of(command.options_class).values()
    if other.kind is Path and not other.metadata["is_output"]
]


@pytest.mark.parametrize(("option", "other"), BESIDE)
def test_what_is_read_is_not_written_over(tmp_path, option, other):
    command, setting = OUTPUTS[option]
    settings = settings_of(command.options_class)
    given = {name: "x" for name, one in settings.items() if one.default is MISSING}
    path = tmp_path / "read.html"
    path.write_text("here before")
    (tmp_path / "a").mkdir()
    same = {setting.name: str(tmp_path / "a/../read.html"), other: [path] if settings[other].many else path}
    options = command.options_class(**given | same)
    if setting.metadata["may_replace"] == other:
        check_outputs(options)
    else:
        with pytest.raises(UsageError, match=f"{setting.label} would write over .*, which {settings[other].label} na"):
            check_outputs(options)
    assert path.read_text() == "here before" and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("words", ["make", "recover"])
def test_a_directory_that_cannot_be_written_is_said_before_anything_is_fetched(landmark, tmp_path, monkeypatch, words):
    monkeypatch.setattr(f"landmark_cli.weight_diff.{words}.locate", lambda *_, **__: pytest.fail("work was begun"))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    written, read = ("diff", "tuned") if words == "make" else ("tuned", "diff")
    paths = ["--path-raw=org/raw", f"--path-{read}=org/{read}", f"--path-{written}"]
    result = landmark("weight-diff", words, *paths, tmp_path / "file/new")
    assert result.code == 1 and f"--path-{written} {tmp_path}/file cannot be written: Not a directory" in result.err
    result = landmark("weight-diff", words, *paths, tmp_path / "full")
    assert result.code == 2 and "the directory is not empty" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def a_table(path):
    write_tables(path, Study("name", "title", {}, []), ["column"], [["cell"]], {})


def a_picture(path):
    from matplotlib.figure import Figure

    save_picture(Figure(), path / "x.png", dpi=10)


TRACE = GenerationTrace("x", 0, 1, 4, ["a"], ["b"], [[]])
WRITERS = {
    "--json": lambda path: console.write_json({}, path / "x.json"),
    "--trace as data": lambda path: write_trace(path / "x.json", TRACE),
    "--trace as a page": lambda path: write_trace(path / "x.html", TRACE),
    "--plot": a_picture,
    "--output of a study": a_table,
    "finished rows": lambda path: FinishedRows(path / "rows.jsonl").add("key", {}),
    "metrics": lambda path: MetricsFile(path / "metrics.jsonl").append({"step": 1}),
    "metrics, rewound": lambda path: MetricsFile(path / "metrics.jsonl").rewind(1),
    "recipe": lambda path: save_recipe(GreetOptions(), path / "recipe.yaml", "greet"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_every_writer_names_the_file_that_the_disk_refuses(tmp_path, monkeypatch, writer, number):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(number, os.strerror(number))

    def full(path, mode="r", *rest, **options):
        if not set("wa").isdisjoint(mode) and str(path).startswith(str(tmp_path)):
            return Full() if "b" in mode else io.TextIOWrapper(Full(), write_through=True)
        return real(path, mode, *rest, **options)

    real = open
    monkeypatch.setattr(builtins, "open", full)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(LandmarkError) as error:
        WRITERS[writer](tmp_path)
    assert re.match(rf"(--\w+ )?{tmp_path}\S* cannot be written: {os.strerror(number)}(; |$)", str(error.value))
    assert "\n" not in str(error.value)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
