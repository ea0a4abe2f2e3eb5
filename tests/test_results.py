"""recipes/results: the page made of what was measured, and recipes that differ in their attention alone."""

import dataclasses
import json
import re
import sys

import pytest
import yaml

from landmark_cli.commands.finetune import FinetuneOptions, check
from landmark_cli.evaluation.passkey import wilson_interval
from landmark_cli.evaluation.studies import load_study
from landmark_cli.options import build, load_recipe, recipes_folder, settings_of
from tests.modules import load_script

FOLDER = recipes_folder() / "results"


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        # Where a script lies, its own modules are found.
        patch.syspath_prepend(FOLDER)
        return load_script(FOLDER / "report.py")


def study(name, role, perplexity):
    """What `landmark eval study --json` writes of one role; perplexity(row) -> figure."""
    rows = []
    for row in load_study(name).rows:
        result = {"perplexity": perplexity(row), "tokens": 2000} if row.role == role else None
        rows.append({**dataclasses.asdict(row), "result": result})
    return {"study": name, "rows": rows}


def keys(found):
    """What `landmark eval passkey --json` writes: length -> keys found of 50."""
    cells = [
        {"tokens": n, "prompts": 50, "found": f, "accuracy": f / 50, "interval": wilson_interval(f, 50)}
        for n, f in found.items()
    ]
    return {"lengths": cells, "trials": []}


@pytest.fixture
def measured(tmp_path):
    """A folder of results: the three models on novels, the landmark model's longest pass keys apart."""

    def write(part, files, log=()):
        (tmp_path / part).mkdir()
        for name, content in files.items():
            (tmp_path / part / name).write_text(json.dumps(content))
        (tmp_path / part / "log.tsv").write_text("\n".join(log))

    # The more blocks and the longer the text, the better; but worse where all heads share a choice.
    def landmark(row):
        settings = row.settings
        shared = settings.get("selection", "per_token_and_head") != "per_token_and_head"
        return 80 - settings["top-k-blocks"] - settings["eval-length"] / 1024 + shared

    log = ["machine\tsome GPU", "300\tlandmark train --recipe results/landmark", "20\tlandmark eval", "total\t330"]
    tables = {name + ".json": study(name, "landmark", landmark) for name in ("table1", "table2")}
    write("landmark", tables | {"passkey-k4.json": keys({512: 50, 32768: 49})}, log)
    write("million", {"passkey-k4.json": keys({1000000: 45})})
    write("baseline", {"table1.json": study("table1", "baseline", lambda row: 79.0), "passkey.json": keys({512: 50})})
    write("xl", {"table1.json": study("table1", "xl", lambda row: 70.0)})
    records = [{"step": 0, "validation_loss": 4.0, "validation_perplexity": 54.6}]
    for step in (1, 2):
        records.append({"step": step, "loss": 5.0 - step, "tokens": 65536 * step, "tokens_per_second": 1e6 * step})
        records[-1] |= {"peak_memory": 2**31, "mfu": 0.25}
    (tmp_path / "landmark" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def test_the_page_brings_together_what_the_parts_measured(report, measured, tmp_path):
    page = report.report(report.read_parts(measured), tmp_path / "docs")
    assert "Machine: some GPU." in page
    assert (
        "| landmark attention, novels and pass keys | 2 | 0M | 3.00 | 54.60 | 2,000,000 | 25.0% | 2.0 GiB | 300 s |"
        in page
    )
    assert "| baseline | 512 | 512 |" in page and "| 79.00 | 2,000 | 16.12 |" in page
    assert page.count("| xl | 2048 |") == 1 and "max_over_tokens" in page
    # 80 - 4 - 2 against 79, and against 70.
    assert "| landmark at 2048, k = 4, against the baseline at 512 | -7.4% | -6.3% | yes |" in page
    assert "| landmark at 2048, k = 4, against Transformer-XL at 2048 | +1.4% | +5.7% | yes |" in page
    assert "| landmark at 512, k = 2, against the baseline at 512 | +0.7% | -1.9% | no |" in page
    assert page.count("against the same for all") == 2
    assert "| 32,768 | 49/50 = 98% (0.90-1.00) |  |" in page
    assert "| 1,000,000 | 45/50 = 90% (0.79-0.96) |" in page
    assert "    300 s  landmark train --recipe results/landmark" in page and "330 s in all" in page
    assert (tmp_path / "docs" / "results-passkey.png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_ruler(report, measured, tmp_path):
    """A table for each model, of however many files."""

    def cell(reading, tokens, task, score):
        return {"reading": reading, "tokens": tokens, "task": task, "score": score, "samples": 20}

    files = {
        "ruler-k4": [cell("top-k 4", 1024, "vt", 1.0), cell("top-k 4", 1024, "fwe", 0.5)],
        "ruler-million": [cell("top-k 16", 1_000_000, "vt", 0.25)],
    }
    (measured / "ruler-recipe").mkdir()
    (measured / "ruler-untouched").mkdir()
    for name, cells in files.items():
        (measured / "ruler-recipe" / f"{name}.json").write_text(json.dumps({"cells": cells}))
    (measured / "ruler-recipe" / "about.md").write_text("After 600 steps.\n")
    page = report.report(report.read_parts(measured), tmp_path / "docs")
    assert page[page.index("### SmolLM2-135M with") : page.index("## Commands")].splitlines() == [
        "### SmolLM2-135M with landmarks, novels and pass keys",
        "",
        "After 600 steps.",
        "",
        "| task | top-k 4, 1,024 | top-k 16, 1,000,000 |",
        "| --- | ---: | ---: |",
        "| vt | 1.00 | 0.25 |",
        "| fwe | 0.50 |  |",
        "| mean | 0.75 | 0.25 (of 1) |",
        "| samples of a task | 20 | 20 |",
        "",
    ]
    assert page.count("### ") == 1


def test_prompts_that_were_all_made_of_one_text_are_said_to_be(report, measured, tmp_path):
    """Prompts whose stretches of the haystack were drawn say where they begin; earlier ones do not."""

    def said(old_keys, new_keys, old_ruler, new_ruler):
        for name, old in (("untouched", old_keys), ("distilled", new_keys)):
            trials = [{"length": 512} | ({} if old else {"begin": 7})]
            write(f"ruler-{name}/passkey-novels", keys({512: 50}) | {"haystack": "novels", "trials": trials})
        for name, old in (("untouched", old_ruler), ("recipe", new_ruler)):
            cell = {"reading": "own window", "tokens": 512, "task": "niah_single_2", "score": 1.0, "samples": 1}
            filler = cell | {"task": "niah_single_1"}
            write(f"ruler-{name}/ruler", {"cells": [filler, cell | ({} if old else {"begins": [7]})]})
        page = report.report(report.read_parts(measured), tmp_path / "docs")
        return re.findall(r" All prompts in prose( \(.*?\))? that have one length have the same text", page)

    def write(place, content):
        path = measured / f"{place}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    # RULER's section comes first. The pass keys of the other parts lie in filler.
    assert said(False, False, False, False) == []
    assert said(True, True, True, True) == ["", ""]
    assert said(True, False, False, True) == [
        " (SmolLM2-135M with landmarks, novels and pass keys)",
        " (untouched, full attention)",
    ]


def test_variants_stand_in_one_table_and_what_was_not_measured_is_left_open(report, measured, tmp_path):
    def write(name, options=None, records=(), files=()):
        folder = measured / "made-of" / name
        folder.mkdir(parents=True, exist_ok=True)
        if options is not None:
            (folder / "options.txt").write_text(f"{options}\n")
            (folder / "log.tsv").write_text(f"90\tlandmark finetune {options}\n5\tlandmark eval perplexity")
        if records:
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        for file, content in dict(files).items():
            (folder / file).write_text(json.dumps(content))

    def steps(*speeds):
        return [
            {"step": n, "loss": 1.0, "tokens": n, "peak_memory": 1, "tokens_per_second": s}
            for n, s in enumerate(speeds, 1)
        ]

    def perplexity(length, found):
        return {"kind": "perplexity", "settings": {"eval-length": length}, "result": found and {"perplexity": found}}

    def ruler(length, mean, **settings):
        result = {"score": mean, "interval": mean and [0.1, 0.9], "tasks": {"vt": mean, "fwe": mean}, "answers": 20}
        result |= {} if mean else {"tasks": {}, "answers": 0}
        return {"kind": "ruler", "settings": {"length": length, **settings}, "result": result}

    def pass_keys(length, found, **settings):
        (cell,) = keys({length: found})["lengths"]
        return {"kind": "passkey", "settings": {"length": length, "prompts": 50, **settings}, "result": cell}

    def rows(*measured):
        return {"rows": measured}

    held_out = {"step": 3, "validation_loss": 3.0, "validation_perplexity": 20.0, "validation_divergence": 0.9}
    of_tasks = {"validation_prose_divergence": 0.0625, "validation_answers_loss": 1.5, "validation_answers_right": 0.75}
    of_tasks["validation_answers_tokens"] = 1200
    both = [perplexity(8192, 30.5), perplexity(65536, 29.0), ruler(65536, 0.25), ruler(8192, 0.5)]
    by_blocks = [
        row
        for k in (2, 16)
        for row in (ruler(8192, k / 32, **{"top-k-blocks": k}), pass_keys(8192, k, **{"top-k-blocks": k}))
    ]
    of_best = {"measured.json": rows(*both, pass_keys(65536, 45)), "blocks.json": rows(*by_blocks)}
    write("best", "", [*steps(1, 400, 200), held_out | of_tasks], of_best)
    write("again", "--sequence-length 1024", [*steps(100), held_out], {"measured.json": rows(ruler(8192, 0.375))})
    write("not-begun", "--lr 1")
    untouched = [perplexity(8192, 34.0), perplexity(65536, None), ruler(8192, 0.625), ruler(65536, None)]
    write("", files={"measured.json": rows(*untouched, pass_keys(8192, 33))})
    (measured / "made-of" / "about.md").write_text("Two at a time.\n")
    page = report.report(report.read_parts(measured), tmp_path / "docs")
    lines = page[page.index("## What distillation") : page.index("## Commands")].splitlines()[4:]
    assert lines[:2] == ["Two at a time.", ""]
    assert lines[2].split(" | ")[3:9] == [
        f"{what} at {n}" for what in ("perplexity", "RULER", "pass keys") for n in ("8,192", "65,536")
    ]
    assert lines[4:9] == [
        "| (untouched, read whole) |  |  | 34.00 |  | 0.62 (0.10-0.90) |  | 33/50 = 66% (0.52-0.78) |  |  |  |  |  |",
        "| none: the recipe | 3 | 0.062 | 30.50 | 29.00 | 0.50 (0.10-0.90) | 0.25 (0.10-0.90) "
        "|  | 45/50 = 90% (0.79-0.96) | 1.50 | 75.0% of 1,200 | 300 | 90 |",
        "| `--sequence-length 1024` | 3 | 0.900 |  |  | 0.38 (0.10-0.90) |  |  |  |  |  | 100 | 90 |",
        "",
        "RULER: vt, fwe, 10 of each.",
    ]
    assert lines[10:14] == [
        "| the recipe's model, read with | RULER at 8,192 | pass keys at 8,192 |",
        "| --- | ---: | ---: |",
        "| top-k 2 | 0.06 (0.10-0.90) | 2/50 = 4% (0.01-0.13) |",
        "| top-k 16 | 0.50 (0.10-0.90) | 16/50 = 32% (0.21-0.46) |",
    ]
    assert page.count("landmark finetune --sequence-length 1024") == 1


def test_changes_stand_in_the_order_of_the_script(report, measured):
    for name in ("block-8", "best", "lr-1", "another", "seed-1"):
        folder = measured / "made-of" / name
        folder.mkdir(parents=True)
        (folder / "options.txt").write_text("\n")

    def names():
        return list(report.read_parts(measured)["made-of"].variants)

    assert names() == ["best", "another", "block-8", "lr-1", "seed-1"]
    (measured / "made-of" / "order.txt").write_text("best\nseed-1\nnot-run\nlr-1\nblock-8\n")
    assert names() == ["best", "seed-1", "lr-1", "block-8", "another"]


def test_keys_in_novels_stand_beside_each_other_before_and_after(report, measured, tmp_path):
    found = {
        "ruler-untouched/passkey-novels": {1024: 40},
        "ruler-distilled/passkey-novels": {1024: 41},
        "ruler-distilled/passkey-novels-long": {1000000: 42},
        "ruler-grouped/passkey-novels": {1024: 46},
        "ruler-distilled-64k/passkey-novels-before": {1024: 43},
        "ruler-distilled-64k/passkey-novels": {1024: 44},
        "ruler-distilled-64k/passkey-novels-long": {1000000: 45},
    }
    for place, of_lengths in found.items():
        path = measured / f"{place}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(keys(of_lengths)))
    page = report.report(report.read_parts(measured), tmp_path / "docs")
    table = page[page.index("## Pass keys in novels") : page.index("## Commands")].splitlines()[4:]
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == [
        "untouched, full attention", "distilled", "distilled, k = 16", "grouped", "grouped, chunks of 2016",
        "then in windows of 64k", "then in windows of 64k, k = 16",
    ]  # fmt: skip
    assert [re.findall(r"(\d+)/50", line) for line in table[2:4]] == [["40", "41", "46", "43", "44"], ["42", "45"]]


def test_windows_of_other_lengths_stand_in_one_table(report, measured, tmp_path):
    for role in ("dense", "16k"):
        folder = measured / f"windows-{role}"
        folder.mkdir()
        content = study(str(FOLDER / "windows.yaml"), role, lambda row: 50.0)
        (folder / "perplexity.json").write_text(json.dumps(content, default=str))
        (folder / "passkey-novels-k8.json").write_text(json.dumps(keys({4096: 25})))
    page = report.report(report.read_parts(measured), tmp_path / "docs")
    section = page[page.index("## Trained as it reads") : page.index("## Commands")]
    assert section.count("| dense | 2048 | 4 |  | 50.00 | 2,000 |") == 1
    assert section.count("| 16k | 65536 | 4 | 250 | 50.00 | 2,000 |") == 1 and "| 64k | 2048 | 4 |  |  |  |" in section
    assert (
        "| tokens | dense, k = 8 | 16k, k = 8 |" in section and "| 4,096 | 25/50 = 50% (0.37-0.63) | 25/50" in section
    )


def test_what_is_varied_are_options_of_a_run_that_go_together():
    """Each line of the script's table, on top of its recipe."""
    script = (FOLDER / "run.sh").read_text()
    table = script[script.index("cat <<TABLE\n") : script.index("\nTABLE\n")].splitlines()[1:]
    assert len(table) > 20 and len({line.split()[0] for line in table}) == len(table)
    recipe = load_recipe("results/smollm2-distilled", FinetuneOptions, "finetune")
    # What the script leaves out of it where there is no teacher.
    without = re.compile("|".join(re.search(r"sed '(/.*/d)'", script)[1].replace("\\", "").split("/")[1::2]))
    fields = settings_of(FinetuneOptions)
    for line in table:
        words = re.sub(r"\$\(windows_of (\d+)\)", r"--sequence-length \1", line).split()[1:]
        given, flags = {}, iter(words)
        for word in flags:
            name = word.removeprefix("--").replace("-", "_")
            if name in ("merge", "no_compile"):
                given[name.removeprefix("no_")] = name == "merge"
            else:
                given[name] = next(flags)
        assert given.keys() <= fields.keys(), line
        of_teacher = [
            name for name in recipe if given.get("teacher") == "none" and without.match(name.replace("_", "-"))
        ]
        values = {name: value for name, value in recipe.items() if name not in of_teacher}
        check(build(FinetuneOptions, values | {"model": "it"} | given))


def test_parts_measured_on_different_machines_are_told_apart(report, measured):
    (measured / "xl" / "log.tsv").write_text("machine\tanother GPU\n")
    lines = report.machine_lines(report.read_parts(measured))
    assert lines == ["Machine of landmark: some GPU.\n", "Machine of xl: another GPU.\n"]


def test_what_was_not_measured_is_left_out(report, measured, tmp_path):
    parts = {"xl": report.read_parts(measured)["xl"]}
    page = report.report(parts, tmp_path)
    assert "| xl | 2048 |" in page and "| landmark | 512 | 250 | 10 | 2 |  |  | 16.23 |" in page
    for absent in ("## Pass keys", "## Training", "## SmolLM2", "## RULER", "mathematics", "same order", ".png"):
        assert absent not in page


def test_what_is_made_of_the_figures_comes_before_them(report, measured, tmp_path, monkeypatch):
    (measured / "reading.md").write_text("**Orders.** As expected.\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(measured), "--output", str(tmp_path / "page.md")])
    report.main()
    page = (tmp_path / "page.md").read_text()
    assert page.index("## Reading\n\n**Orders.** As expected.\n\n## ") < page.index("## Perplexity on novels")


def test_the_page_in_docs_is_what_the_figures_kept_give(report, tmp_path, monkeypatch):
    root = FOLDER.parent.parent
    page = tmp_path / "results.md"
    monkeypatch.setattr(sys, "argv", ["report.py", str(root / "benchmarks/results/study"), "--output", str(page)])
    report.main()
    assert page.read_text() == (root / "docs/results.md").read_text()


def test_a_folder_without_results_is_an_error(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--output", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit):
        report.main()
    assert "run recipes/results/run.sh first" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_the_script_and_the_page_know_the_same_parts(report):
    script = (FOLDER / "run.sh").read_text()
    for part in report.PARTS:
        assert part in script


def test_the_compared_models_differ_in_their_attention_alone():
    recipes = {
        name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        for name in ("landmark", "baseline", "transformer-xl")
    }
    landmark, baseline, recurrent = recipes.values()
    attention = {"landmark-freq", "baseline"}
    shape_of_step = {"sequence-length", "batch-size", "memory-length", "segment-length", "compile"}

    def without(recipe, names):
        return {key: value for key, value in recipe.items() if key not in names}

    assert without(landmark, attention) == without(baseline, attention)
    assert without(baseline, shape_of_step) == without(recurrent, shape_of_step)
    tokens = {r["sequence-length"] * r["batch-size"] * r["accumulation"] for r in recipes.values()}
    assert tokens == {65536}
