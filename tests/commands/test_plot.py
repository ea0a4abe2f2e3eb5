"""`landmark plot`: what stands in a picture of runs and of RULER's tables, and what is refused."""

import json
import math
from dataclasses import replace

import pytest

from landmark_cli.commands.plot import PlotOptions, run
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.evaluation import curves
from landmark_cli.evaluation.ruler import report
from landmark_cli.evaluation.ruler.report import draw_ruler, ruler_data
from landmark_cli.training.metrics_file import MetricsFile
from tests.evaluation.test_ruler_run import cells


def metrics(directory, steps, loss=1.0, **fields):
    """A run's metrics: a record for each step, an evaluation behind the last one."""
    directory.mkdir(parents=True)
    file = MetricsFile(directory / "metrics.jsonl")
    for step in range(1, steps + 1):
        record = {"step": step, "loss": loss / step, "learning_rate": 0.1, "gradient_norm": 0.5, "tokens": step * 8}
        file.append(record | {"tokens_per_second": 100.0 * step} | fields)
    file.append({"step": steps, "validation_loss": 2 * loss, "validation_perplexity": math.exp(2 * loss)})
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, which are saved as ever."""
    figures = []
    for module in (curves, report):
        save = module.save_picture

        def kept(figure, *given, save=save, **named):
            figures.append(figure)
            save(figure, *given, **named)

        monkeypatch.setattr(module, "save_picture", kept)
    return figures


def lines(figure):
    """Of every panel: its title, and the points of its lines."""
    return {
        axes.get_title(): [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]
        for axes in figure.axes
        if axes.get_title()
    }


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_several_runs_stand_in_one_picture(tmp_path, drawn):
    first, second = metrics(tmp_path / "_a$x_1$", 3), metrics(tmp_path / "b", 50, loss=4.0)
    out = run(PlotOptions(what=[first, second / "metrics.jsonl"], out=tmp_path / "new" / "runs.png"))
    assert out.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    shown = lines(figure)
    assert list(shown) == ["loss", "validation loss", "learning rate", "gradient norm", "tokens/s"]
    assert shown["loss"][0] == [(1, 1.0), (2, 0.5), (3, 1 / 3)] and len(shown["loss"][1]) == 50
    assert shown["validation loss"] == [[(3, 2.0)], [(50, 8.0)]]
    assert shown["tokens/s"][0][-1] == (3, 300.0)
    assert legend(figure) == ["_a$x_1$", "b"]


def test_what_was_not_finite_is_a_gap_and_what_is_not_there_has_no_panel(tmp_path, drawn, capsys):
    directory = tmp_path / "run"
    directory.mkdir()
    file = MetricsFile(directory / "metrics.jsonl")
    for step, loss in enumerate((3.0, math.nan, 2.0), 1):
        file.append({"step": step, "loss": loss, "gradient_norm": float(step - 1), "learning_rate": "fast"})
    with open(file.path, "a") as lines_of_file:
        lines_of_file.write('{"step": 4, "loss": 1.0, "crc32": "00000000"}\n{"step"')
    run(PlotOptions(what=[directory], out=tmp_path / "run.svg"))
    shown = lines(drawn[0])
    assert list(shown) == ["loss", "gradient norm"] and drawn[0].get_suptitle() == "run" and legend(drawn[0]) == []
    (loss,) = shown["loss"]
    assert loss[::2] == [(1, 3.0), (3, 2.0)] and math.isnan(loss[1][1])
    assert [axes.get_yscale() for axes in drawn[0].axes[:2]] == ["linear", "linear"]
    assert "2 damaged lines left out" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("x", "y"):
        metrics(tmp_path / place / "run", 2)
    run(PlotOptions(what=["x/run", "y/run"], out="runs.pdf"))
    assert legend(drawn[0]) == ["x/run", "y/run"]


def saved(path, model, some):
    path.write_text(json.dumps({"model": model, "cells": ruler_data(some)}))
    return path


def maps(figure):
    """Of every heat map: its title, and its shares."""
    return [(axes.get_title(), axes.images[0].get_array().tolist()) for axes in figure.axes]


def test_a_table_of_ruler_is_drawn_as_its_evaluation_draws_it(tmp_path, drawn):
    run(PlotOptions(what=[saved(tmp_path / "one.json", "runs/mine", cells())], out=tmp_path / "one.png"))
    columns = {way.name: of_way for way, of_way in report.by_way(cells()).items()}
    draw_ruler(tmp_path / "same.png", columns, "RULER, mine")
    assert str(maps(drawn[0])) == str(maps(drawn[1])) and len(maps(drawn[0])) == 4
    assert drawn[0].get_suptitle() == "RULER, mine"
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "same.png").read_bytes()


def test_tables_of_several_files_stand_side_by_side(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = [replace(cell, answers=[replace(cell.answers[0], score=0.25)]) for cell in cells()[:1]]
    saved(tmp_path / "a.json", "runs/a", cells()), saved(tmp_path / "b.json", "runs/b", other)
    run(PlotOptions(what=["a.json", "b.json"], out="both.png"))
    assert [title for title, _ in maps(drawn[0])][:3] == ["a\ntop-k 2", "a\nfull attention", "b\ntop-k 2"]
    assert maps(drawn[0])[2][1][0][0] == 0.25
    # Figures alone, of which nobody kept the answers nor the model.
    short = [{name: cell[name] for name in ("reading", "task", "tokens", "score")} for cell in ruler_data(other)]
    (tmp_path / "short.json").write_text(json.dumps({"cells": short}))
    run(PlotOptions(what=["a.json", "short.json"], out="both.png"))
    assert [title for title, _ in maps(drawn[1])][2] == "short.json\ntop-k 2"
    # Models of one name in places of their own.
    saved(tmp_path / "c.json", "elsewhere/a", other)
    run(PlotOptions(what=["a.json", "c.json"], out="both.png"))
    titles = [title for title, _ in maps(drawn[2])][:3]
    assert titles == ["a.json\ntop-k 2", "a.json\nfull attention", "c.json\ntop-k 2"]


@pytest.mark.parametrize(
    ("what", "out", "error", "message"),
    [
        (["run", "table.json"], "x.png", UsageError, "table.json is drawn as a table and run as a run"),
        (["run"], "x.docx", UsageError, r"--out x.docx: .docx is no kind of picture"),
        (["empty"], "x.png", LandmarkError, "empty holds no metrics.jsonl, so it is no run's directory"),
        (["nowhere"], "x.png", LandmarkError, "there is no run nowhere"),
        (["begun"], "x.png", LandmarkError, "begun/metrics.jsonl has no figures yet"),
        (["bare.json"], "x.png", LandmarkError, "bare.json holds no scores"),
        (
            ["list.json"],
            "x.png",
            LandmarkError,
            "list.json cannot be read: it lacks cells; name a file",
        ),
        (["gone.json"], "x.png", LandmarkError, "gone.json cannot be read: No such file"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, monkeypatch, what, out, error, message):
    monkeypatch.chdir(tmp_path)
    metrics(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    metrics(tmp_path / "begun", 0)
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"step": 0, "tokens": 3}\n')
    (tmp_path / "bare.json").write_text('{"cells": []}')
    (tmp_path / "list.json").write_text('{"rows": []}')
    saved(tmp_path / "table.json", "runs/mine", cells())
    with pytest.raises(error, match=message):
        run(PlotOptions(what=what, out=out))
    assert not (tmp_path / out).exists()


def test_as_a_user_types_it(landmark, workplace):
    metrics(workplace / "runs" / "drawn", 2), metrics(workplace / "runs" / "beside", 2)
    done = landmark("plot", "runs/drawn", "runs/beside", "--out", "curves.png")
    assert done.code == 0 and done.err == "wrote curves.png\n"
    assert (workplace / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert landmark("plot", "--out", "curves.png").code == 2
