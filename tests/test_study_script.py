"""recipes/results/run.sh, with a stand-in for Python that notes its arguments and leaves the files that it would."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from landmark_cli.options import recipes_folder

STAND_IN = """
import json, os, pathlib, sys
given = sys.argv[1:]
if given == ["-"]:
    print("no machine")
    sys.exit()
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join(given[2:]) + "\\n")
if os.environ.get("FAIL") and os.environ["FAIL"] in " ".join(given):
    sys.exit(1)
after = lambda name: pathlib.Path(given[given.index(name) + 1])
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

    def run(**settings):
        calls.write_text("")
        env = {"PATH": os.environ["PATH"], "PYTHON": str(stand_in), "CALLS": str(calls), "SMOLLM2": "base"}
        script = recipes_folder() / "results" / "run.sh"
        given = {"env": env | places | settings, "capture_output": True, "text": True}
        done = subprocess.run(["bash", str(script)], check=False, timeout=60, **given)
        return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr

    run.folder = tmp_path
    return run


def of(calls, *words):
    """The calls that have all of these words."""
    return [call for call in calls if {*words} <= {*call.split()}]


@pytest.mark.parametrize("at_once", ["1", "3"])
def test_each_change_is_measured_once_whatever_becomes_of_another(study, at_once):
    settings = {"PART": "made-of", "MADE_OF": "best lr-1e-4 no-teacher", "MADE_OF_AT_ONCE": at_once, "MADE_OF_K": ""}
    status, calls, said = study(**settings, FAIL="--lr 1e-4")
    assert status == 1 and "these failed: lr-1e-4" in said
    assert (
        len(of(calls, "finetune")) == 3 and len(of(calls, "study")) == len(of(calls, "ruler")) == 3
    )  # the untouched one
    log = study.folder / "results/made-of/lr-1e-4/log.tsv"
    assert not log.exists()
    # On another machine there are no models, and what was measured is not trained again.
    (study.folder / "runs").rename(study.folder / "elsewhere")
    status, calls, said = study(**settings)
    assert status == 0
    assert [call.split()[0] for call in calls] == ["finetune", "eval", "eval"] and all(
        "lr-1e-4" in call for call in calls
    )
    assert study(**settings)[:2] == (0, [])


def test_changes_see_as_many_tokens_and_answer_the_same_questions(study):
    _, calls, _ = study(PART="made-of", MADE_OF="best windows-1k read-128k", MADE_OF_STEPS="200", MADE_OF_K="2,4")
    trained = [shlex.split(call) for call in of(calls, "finetune")]
    assert len(trained) == 3
    for call in trained:
        # The last of an option counts; the recipe's windows are 4 of 8192.
        options = {name: value for name, value in zip(call, call[1:], strict=False) if name.startswith("--")}
        tokens = [int(options.get(f"--{name}", n)) for name, n in {"sequence-length": 8192, "batch-size": 4}.items()]
        assert tokens[0] * tokens[1] * int(options["--steps"]) == 200 * 32768
    asked = {call.split("--tasks")[1].split("--output")[0] for call in of(calls, "ruler")}
    assert len(asked) == 1
    assert [call.split("--top-k-blocks ")[1].split()[0] for call in of(calls, "--top-k-blocks")] == ["2,4"]


def test_a_change_that_there_is_none_of_is_refused(study):
    status, _, said = study(PART="made-of", MADE_OF="best nothing", MADE_OF_K="")
    assert status == 2 and "of MADE_OF=best nothing some are none of: best " in said


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
