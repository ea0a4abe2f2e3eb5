"""recipes/results/run.sh, with a stand-in for Python that notes its arguments and leaves the files that it would."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from landmark_cli.evaluation.studies import load_study
from landmark_cli.options import recipes_folder

STAND_IN = """
import json, os, pathlib, signal, sys, time
given = sys.argv[1:]
if given == ["-"]:
    print("no machine")
    sys.exit()
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join(given[2:]) + "\\n")
if os.environ.get("FAIL") and os.environ["FAIL"] in " ".join(given):
    sys.exit(1)
after = lambda name: pathlib.Path(given[given.index(name) + 1])
held = [words for words in os.environ.get("HELD", "").split("|") if words and words in " ".join(given)]
if held:
    # What it keeps takes a moment, in which whoever started it has to wait.
    def stop(number, frame):
        time.sleep(0.5)
        with open(os.environ["CALLS"], "a") as file:
            file.write("kept\\n")
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    with open(os.environ["CALLS"], "a") as file:
        file.write("held\\n")
    time.sleep(30)
    sys.exit(1)
until = os.environ.get("UNTIL")
if until and given[2] == "eval" and "/best " in " ".join(given) + " ":
    begin = time.monotonic()
    while until not in open(os.environ["CALLS"]).read():
        time.sleep(0.05)
        if time.monotonic() - begin > 20:
            sys.exit(1)
if given[2] == "finetune":
    # Of two at a time the second fails.
    alone = pathlib.Path(os.environ["CALLS"] + ".training")
    alone.mkdir()
    time.sleep(0.1)
    alone.rmdir()
if "--json" in given:
    after("--json").write_text("{}")
elif given[2] in ("finetune", "prepare"):
    after("--output").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "train.json"):
        (after("--output") / name).write_text("{}")
"""


@pytest.fixture
def study(tmp_path):
    """run(PART=..., ...) -> (exit status, what it called since the last time, what it said)."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!{sys.executable}\n{STAND_IN}")
    stand_in.chmod(0o755)
    calls = tmp_path / "calls"
    places = {name: str(tmp_path / name.lower()) for name in ("DATA", "RUNS", "RESULTS", "DOCS", "NOVELS")}

    def start(**settings):
        calls.write_text("")
        env = {"PATH": os.environ["PATH"], "PYTHON": str(stand_in), "CALLS": str(calls), "SMOLLM2": "base"}
        script = recipes_folder() / "results" / "run.sh"
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(["bash", str(script)], env=env | places | settings, **given)

    def run(**settings):
        with start(**settings) as process:
            said, _ = process.communicate(timeout=60)
        return process.returncode, called(), said

    def called():
        return calls.read_text().splitlines()

    run.folder, run.start, run.called = tmp_path, start, called
    return run


def of(calls, *words):
    """The calls that have all of these words."""
    return [call for call in calls if {*words} <= {*call.split()}]


@pytest.mark.parametrize("at_once", ["1", "2", "3"])
def test_each_change_is_measured_once_whatever_becomes_of_another(study, at_once):
    settings = {"PART": "made-of", "MADE_OF": "best lr-1e-4 no-teacher", "MADE_OF_AT_ONCE": at_once, "MADE_OF_K": ""}
    status, calls, said = study(**settings, FAIL="--lr 1e-4")
    assert status == 1 and "these failed: lr-1e-4" in said
    # All that is measured of a model takes one command; the untouched one is measured too.
    assert len(of(calls, "finetune")) == 3 and len(of(calls, "eval")) == len(of(calls, "study")) == 3
    log = study.folder / "results/made-of/lr-1e-4/log.tsv"
    assert not log.exists()
    # On another machine there are no models, and what was measured is not trained again.
    (study.folder / "runs").rename(study.folder / "elsewhere")
    status, calls, said = study(**settings)
    assert status == 0
    assert [call.split()[0] for call in calls] == ["finetune", "eval"] and all("lr-1e-4" in call for call in calls)
    assert study(**settings)[:2] == (0, [])


def test_the_next_is_trained_while_one_is_measured(study):
    """Where that is asked for; and two are never trained at a time. The measuring here ends once the training began."""
    settings = {"PART": "made-of", "MADE_OF": "best text-0.4", "MADE_OF_K": ""}
    status, calls, said = study(**settings, MADE_OF_AT_ONCE="2", UNTIL="--text-weight 0.4")
    assert status == 0, said
    first, second = of(calls, "finetune")
    assert (study.folder / "results/made-of/about.md").exists()
    listed = (study.folder / "results/made-of/order.txt").read_text().split()
    assert listed[:2] == ["best", "text-0.4"] and len(listed) == len(set(listed)) > 20
    assert "--text-weight" not in first and "--text-weight" in second and len(of(calls, "eval")) == 3


def test_a_part_and_a_row_that_change_the_same_are_told_once(study):
    """A whole run without long values has the kinds of tasks that the table's row has."""
    status, calls, said = study(PART="ruler-distilled ruler-short-values", RULER_WAYS="none")
    assert status == 0, said
    recipe, short = of(calls, "finetune")
    _, calls, _ = study(PART="made-of", MADE_OF="short-values", MADE_OF_K="")
    (row,) = of(calls, "finetune")
    kinds = re.findall(r"--kinds (\w+)", short)
    assert "--kinds" not in recipe and kinds == re.findall(r"--kinds (\w+)", row)
    assert len(kinds) == 10 and "transcription" not in kinds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at_once", ["1", "2"])
def test_a_signal_lets_what_runs_keep_its_place_and_begins_nothing_more(study, at_once, number):
    settings = {"PART": "made-of report", "MADE_OF": "best text-0.4 grouped", "MADE_OF_AT_ONCE": at_once}
    # The measurements of one, and the training of the next where it has begun.
    with study.start(**settings, HELD="runs/made-of/best --data|--text-weight 0.4") as process:
        begin = time.monotonic()
        while study.called().count("held") < int(at_once):
            assert time.monotonic() - begin < 30 and process.poll() is None
            time.sleep(0.05)
        before = study.called()
        os.killpg(process.pid, number)
        # What it left running would hold its output open, and be waited for.
        assert process.wait(timeout=20) == 128 + number
        assert study.called() == before + ["kept"] * int(at_once)
        assert "a signal stopped it" in process.stdout.read()
    status, calls, said = study(**settings)
    assert status == 0, said
    assert len(of(calls, "finetune")) == 2 and not of(calls, f"{study.folder}/runs/made-of/best", "finetune")


def test_all_models_are_asked_the_same(study):
    _, calls, _ = study(PART="made-of", MADE_OF="best block-32", MADE_OF_KEYS="4096,32768", MADE_OF_K="2,4")
    asked = {}
    for call in of(calls, "study"):
        name = call.split("--output ")[1].split()[0].rsplit("/", 1)[1]
        words = shlex.split(call)
        asked[name] = [words[words.index(option) + 1] for option in ("--data", "--haystack", "--samples")]
        asked[name].append(load_study(words[2]).rows)
    assert asked.keys() == {"made-of-untouched", "best-measured", "block-32-measured", "best-blocks"}
    assert len({tuple(of_one[:3]) for of_one in asked.values()}) == 1
    assert asked["best-measured"] == asked["block-32-measured"]
    rows = {name: [(row.kind, *row.settings.values()) for row in of_one[3]] for name, of_one in asked.items()}
    tasks = ["niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue"]
    read = [("perplexity", 8192), ("perplexity", 65536)]
    assert rows["best-measured"] == [
        *read, ("ruler", 8192, tasks), ("ruler", 65536, tasks), ("passkey", 4096, 20), ("passkey", 32768, 20),
    ]  # fmt: skip
    # With full attention its positions end at the first of the lengths.
    assert rows["made-of-untouched"] == [*read, ("ruler", 8192, True, tasks), ("passkey", 8192, True, 20)]
    assert rows["best-blocks"] == [(*row, k) for k in (2, 4) for row in rows["best-measured"][2:]]


def test_changes_see_as_many_tokens(study):
    _, calls, _ = study(PART="made-of", MADE_OF="best windows-1k read-128k", MADE_OF_STEPS="200", MADE_OF_K="")
    trained = [shlex.split(call) for call in of(calls, "finetune")]
    assert len(trained) == 3
    for call in trained:
        # The last of an option counts; the recipe's windows are 4 of 8192.
        options = {name: value for name, value in zip(call, call[1:], strict=False) if name.startswith("--")}
        tokens = [int(options.get(f"--{name}", n)) for name, n in {"sequence-length": 8192, "batch-size": 4}.items()]
        assert tokens[0] * tokens[1] * int(options["--steps"]) == 200 * 32768


def test_a_change_that_there_is_none_of_is_refused(study):
    status, calls, said = study(PART="made-of", MADE_OF="best nothing", MADE_OF_K="")
    assert status == 2 and "MADE_OF=best nothing: there is no change called nothing; there are best text-0.4 " in said
    assert [call.split()[0] for call in calls] == ["prepare"]


def test_windows_of_64k_go_on_from_the_grouped_model_and_learn_from_the_untouched_one(study):
    status, calls, said = study(PART="ruler-distilled-64k")
    assert status == 2 and calls == [] and "run that part first" in said
    status, calls, _ = study(PART="ruler-grouped ruler-distilled-64k", RULER_WAYS="keys long-keys")
    assert status == 0
    (first, second), runs = of(calls, "finetune"), study.folder / "runs"
    assert f"--model {runs}/ruler-grouped " in second and "--softmax grouped" in first
    assert "--teacher base" in second and "--model base " in first
    keys = {str(runs / name): [] for name in ("ruler-grouped", "ruler-distilled-64k")}
    for call in of(calls, "passkey"):
        keys[call.split("--model ")[1].split()[0]].append(call)
    before, after = keys.values()
    assert len(before) == 3 and len(after) == 2
    # The model of before in the chunks of after, too: 32 blocks of 63 text tokens.
    assert [call for call in before if "--chunk 2016" in call] == before[2:]
    assert {json.dumps(call.split("--lengths ")[1].split()[0]) for call in [*before[:2], *after]} == {
        '"1024,4096,8192,16384,65536"', '"131072,1000000"',
    }  # fmt: skip


@pytest.mark.parametrize(
    "ways, expected", [("keys", ["passkey"]), ("k16", ["ruler"]), ("k4 long keys", ["ruler", "passkey"]), ("none", [])]
)
def test_the_untouched_model_is_asked_what_the_others_are(study, ways, expected):
    status, calls, _ = study(PART="ruler-untouched", RULER_WAYS=ways)
    assert status == 0 and [call.split()[1] for call in calls] == expected
    assert all("--full-attention" in call for call in calls)
