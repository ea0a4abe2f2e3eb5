"""What recipes/results/run.sh measured, as one page with its pictures.

    python recipes/results/report.py runs/results --output docs/results.md

The folder holds one folder for each part: tables of perplexities (table1.json, ...), pass keys (passkey*.json), RULER's
tasks (ruler*.json, of which the answers are not needed), what training wrote (metrics.jsonl), the commands with their
seconds (log.tsv) and, where more has to be said of it, about.md. What is not there is left out. A reading.md in it,
what somebody makes of the figures, comes first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = {
    "data": "token files",
    "landmark": "landmark attention, novels and pass keys",
    "baseline": "ordinary attention, the same data",
    "xl": "Transformer-XL, the same data",
    "million": "the landmark model, longest pass keys",
    "windows-dense": "the landmark model, trained dense in windows of 512",
    "windows-16k": "the same, trained as it reads in windows of 16k",
    "windows-64k": "the same, trained as it reads in windows of 64k",
    "math-landmark": "landmark attention, mathematics",
    "math-baseline": "ordinary attention, mathematics",
    "math-xl": "Transformer-XL, mathematics",
    "smollm2-untouched": "SmolLM2-135M as it is",
    "smollm2-novels": "SmolLM2-135M with landmarks, novels",
    "smollm2-passkey": "SmolLM2-135M with landmarks, novels and pass keys",
    "ruler-untouched": "RULER, SmolLM2-135M as it is",
    "ruler-recipe": "RULER, SmolLM2-135M with landmarks, novels and pass keys",
    "ruler-distilled": "RULER, SmolLM2-135M with landmarks by distillation from itself",
}
NOVELS, WINDOWS, MATH, SMOLLM2, RULER = (
    ("landmark", "baseline", "xl"),
    ("windows-dense", "windows-16k", "windows-64k"),
    ("math-landmark", "math-baseline", "math-xl"),
    ("smollm2-untouched", "smollm2-novels", "smollm2-passkey"),
    ("ruler-untouched", "ruler-recipe", "ruler-distilled"),
)


@dataclass
class Part:
    """What one part left. tables, keys, ruler: the JSON of its studies, of its pass keys and of RULER, by the file's
    name. about: what else is to be said of it.

    training: the records of metrics.jsonl. commands: (seconds, command) in their order; seconds: of the whole part.
    """

    name: str
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    ruler: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: str = ""
    training: list[dict[str, Any]] = field(default_factory=list)
    machine: str | None = None
    commands: list[tuple[int, str]] = field(default_factory=list)
    seconds: int | None = None


Parts = dict[str, Part]


def read_parts(folder: Path) -> Parts:
    """The parts of a folder, in the order of PARTS."""
    return {name: read_part(folder / name) for name in PARTS if (folder / name).is_dir()}


def read_part(folder: Path) -> Part:
    part = Part(folder.name)
    for path in sorted(folder.glob("*.json")):
        known = {"passkey": part.keys, "ruler": part.ruler}
        kind = next((kind for begin, kind in known.items() if path.stem.startswith(begin)), part.tables)
        kind[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    for path in folder.glob("about.md"):
        part.about = path.read_text(encoding="utf-8").strip()
    for path in folder.glob("metrics.jsonl"):
        part.training = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for path in folder.glob("log.tsv"):
        for line in path.read_text(encoding="utf-8").splitlines():
            first, _, rest = line.partition("\t")
            if first == "machine":
                part.machine = rest
            elif first == "total":
                part.seconds = max(part.seconds or 0, int(rest))
            else:
                part.commands.append((int(first), rest))
    return part


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table; numbers stand on the right."""
    rows = [
        ["" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row] for row in rows
    ]
    right = [all(str(row[i])[:1].isdigit() or row[i] == "" for row in rows) for i in range(len(columns))]
    lines = [columns, ["---:" if one else "---" for one in right], *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def training_table(parts: Parts) -> list[str]:
    """How every model was trained, by its metrics.jsonl; tokens include landmarks."""
    columns = ["model", "steps", "tokens", "loss", "validation perplexity", "tokens/s", "MFU", "memory", "wall time"]
    rows = []
    for part in parts.values():
        steps = [record for record in part.training if "loss" in record]
        if not steps:
            continue
        last, settled = steps[-1], steps[1:] or steps
        mfu = [record["mfu"] for record in settled if record.get("mfu")]
        validation = [record["validation_perplexity"] for record in part.training if "validation_loss" in record]
        taken = [
            seconds for seconds, command in part.commands if command.startswith(("landmark train", "landmark fine"))
        ]
        rows.append(
            [
                PARTS[part.name],
                f"{last['step']:,}",
                f"{last['tokens'] / 1e6:.0f}M",
                last["loss"],
                validation[-1] if validation else None,
                f"{statistics.median(record['tokens_per_second'] for record in settled):,.0f}",
                f"{statistics.median(mfu):.1%}" if mfu else None,
                f"{last['peak_memory'] / 2**30:.1f} GiB",
                f"{sum(taken)} s" if taken else None,
            ]
        )
    return markdown(columns, rows) if rows else []


def study_rows(parts: Parts, names: Sequence[str], study: str) -> list[dict[str, Any]]:
    """The rows of a study, each with the result of whichever part measured it; None where none did."""
    tables = [parts[name].tables[study] for name in names if name in parts and study in parts[name].tables]
    if not tables:
        return []
    together = zip(*(table["rows"] for table in tables), strict=True)
    return [next((row for row in rows if row["result"]), rows[0]) for rows in together]


def perplexity_table(rows: list[dict[str, Any]], corpus: str | None) -> list[str]:
    """Rows of a study with the paper's figures for a corpus beside them."""
    settings = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    columns = ["model", *settings, "perplexity", "tokens read", *([f"paper, {corpus}"] if corpus else [])]
    cells = []
    for row in rows:
        result = row["result"] or {}
        line = [row["role"], *(row["settings"].get(key) for key in settings), result.get("perplexity")]
        tokens = f"{result['tokens']:,}" if result else None
        cells.append([*line, tokens, *([row["paper"].get(corpus)] if corpus else [])])
    return markdown(columns, cells)


Figures = Callable[..., tuple[float, float] | None]


def figures(rows: list[dict[str, Any]], corpus: str) -> Figures:
    """find(role, eval-length=..., ...) -> (ours, the paper's) of the first row that has these settings, or None."""

    def find(role: str, length: int, **wanted: Any) -> tuple[float, float] | None:
        wanted = {"eval-length": length, **{key.replace("_", "-"): value for key, value in wanted.items()}}
        for row in rows:
            if row["role"] == role and wanted.items() <= row["settings"].items() and row["result"]:
                return row["result"]["perplexity"], row["paper"].get(corpus)
        return None

    return find


def order_table(rows: list[dict[str, Any]], corpus: str) -> list[str]:
    """The orders that the paper's tables show, there and here: first over second, and whether ours has the same sign.

    Orders are of perplexities, lower being better; a row whose two figures were not both measured is left out.
    """
    find = figures(rows, corpus)
    plain, wide = find("baseline", 512), {"chunk": 250, "cache_blocks": 40}
    four = find("landmark", 2048, **wide, top_k_blocks=4)
    longer = find("landmark", 4096, chunk=250, cache_blocks=80, top_k_blocks=4)
    heads, tokens = ({"selection": f"max_over_{what}", "top_k_blocks": 4} for what in ("heads", "tokens"))
    own = find("landmark", 2048, selection="per_token_and_head", top_k_blocks=4)
    claims = [
        ("landmark at 512, k = 2, against the baseline at 512", find("landmark", 512), plain),
        ("landmark at 2048, k = 4, against the baseline at 512", four, plain),
        ("landmark at 4096, k = 4, against the baseline at 512", longer, plain),
        ("landmark at 2048, k = 4, against k = 2", four, find("landmark", 2048, **wide, top_k_blocks=2)),
        ("landmark, k = 4, at 4096 against at 2048", longer, four),
        ("landmark at 2048, k = 4, against Transformer-XL at 2048", four, find("xl", 2048)),
        ("landmark at 4096, k = 4, against Transformer-XL at 4096", longer, find("xl", 4096)),
        ("own blocks for each token and head against the same for all heads", own, find("landmark", 2048, **heads)),
        ("own blocks for each token and head against the same for all tokens", own, find("landmark", 2048, **tokens)),
    ]
    lines = []
    for claim, first, second in claims:
        if first is None or second is None or None in (first[1], second[1]):
            continue
        ours, papers = (first[i] / second[i] - 1 for i in range(2))
        lines.append([claim, f"{papers:+.1%}", f"{ours:+.1%}", "yes" if ours * papers > 0 else "no"])
    return markdown(["perplexity of", "paper", "here", "same order"], lines) if lines else []


def key_lines(parts: Parts, sources: dict[str, Sequence[str]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Label -> length -> cell (prompts, found, accuracy, interval). sources: label -> the "part/file"s to look in."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for label, places in sources.items():
        for place in places:
            name, _, file = place.partition("/")
            cells = parts[name].keys.get(file, {"lengths": []})["lengths"] if name in parts else []
            for cell in cells:
                found.setdefault(label, {})[cell["tokens"]] = cell
    return found


def key_table(lines: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Keys found by length, with Wilson's 95 % interval."""

    def cell(one: dict[str, Any] | None) -> str:
        if one is None:
            return ""
        low, high = one["interval"]
        return f"{one['found']}/{one['prompts']} = {one['accuracy']:.0%} ({low:.2f}-{high:.2f})"

    lengths = sorted({length for line in lines.values() for length in line})
    rows = [[f"{length:,}", *(cell(line.get(length)) for line in lines.values())] for length in lengths]
    return markdown(["tokens", *lines], rows)


def draw_keys(lines: dict[str, dict[int, dict[str, Any]]], path: Path, trained: int) -> None:
    """Keys found by length, one line for each label; trained: text tokens that the models were trained on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for label, line in lines.items():
        lengths = sorted(line)
        shares = [line[length]["accuracy"] for length in lengths]
        low, high = zip(*(line[length]["interval"] for length in lengths), strict=True)
        spread = [
            [max(share - one, 0.0) for share, one in zip(shares, low, strict=True)],
            [max(one - share, 0.0) for share, one in zip(shares, high, strict=True)],
        ]
        axes.errorbar(lengths, shares, yerr=spread, marker="o", markersize=4, capsize=3, label=label)
    axes.axvline(trained, linestyle=":", color="grey", label=f"trained on {trained:,} tokens")
    axes.set_xscale("log", base=2)
    ticks = sorted({length for line in lines.values() for length in line})
    axes.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in ticks], rotation=30)
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("keys found")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def key_section(lines: dict[str, dict[int, dict[str, Any]]], picture: Path, trained: int) -> list[str]:
    if not lines:
        return []
    draw_keys(lines, picture, trained)
    return [*key_table(lines), f"![keys found by length of the prompt]({picture.name})", ""]


def ruler_tables(parts: Parts) -> list[str]:
    """For each model a table of RULER's scores: a row for each task, a column for each way of reading and length."""
    lines = []
    for part in (parts[name] for name in RULER if name in parts and parts[name].ruler):
        cells = [cell for file in part.ruler.values() for cell in file["cells"]]
        found = {(cell["reading"], cell["tokens"], cell["task"]): cell for cell in cells}
        lengths = sorted({cell["tokens"] for cell in cells})
        readings, tasks = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("reading", "task"))
        ways = [(reading, length) for reading in readings for length in lengths]
        of_ways = [[found[(*way, task)] for task in tasks if (*way, task) in found] for way in ways]
        shown = [(way, some) for way, some in zip(ways, of_ways, strict=True) if some]
        rows = [[task, *(found.get((*way, task), {}).get("score") for way, _ in shown)] for task in tasks]
        means = [sum(cell["score"] for cell in some) / len(some) for _, some in shown]
        rows.append(["mean", *(f"{one:.2f}{_of(some, tasks)}" for one, (_, some) in zip(means, shown, strict=True))])
        rows.append(["samples of a task", *(min(cell["samples"] for cell in some) for _, some in shown)])
        columns = ["task", *(f"{reading}, {length:,}" for (reading, length), _ in shown)]
        lines += [f"### {PARTS[part.name].removeprefix('RULER, ')}", ""]
        lines += [part.about, ""] if part.about else []
        lines += markdown(columns, rows)
    return lines


def _of(cells: list[dict[str, Any]], tasks: list[str]) -> str:
    return "" if len(cells) == len(tasks) else f" (of {len(cells)})"


def commands(parts: Parts) -> list[str]:
    """Every command of every part with its seconds."""
    lines = []
    for part in parts.values():
        total = "" if part.seconds is None else f", {part.seconds} s in all"
        lines += [
            f"{part.name}: {PARTS[part.name]}{total}",
            "",
            *(f"    {s:>4} s  {line}" for s, line in part.commands),
        ]
        lines.append("")
    return lines


def machine_lines(parts: Parts) -> list[str]:
    """What was measured where; which parts, if there were several machines."""
    machines: dict[str, list[str]] = {}
    for part in parts.values():
        if part.machine:
            machines.setdefault(part.machine, []).append(part.name)
    if len(machines) == 1:
        return [f"Machine: {machine}.\n" for machine in machines]
    return [f"Machine of {', '.join(names)}: {machine}.\n" for machine, names in machines.items()]


def report(parts: Parts, folder: Path, reading: str = "") -> str:
    """The whole page; its pictures are written into `folder`. reading: what is to be made of the figures."""
    lines = [
        "# Results",
        "",
        "`recipes/results/run.sh` repeats all of this on one GPU; its recipes lie beside it, and this page is what "
        "`PART=report` made of the figures. Every command stands at the end.",
        "",
        *machine_lines(parts),
        *(["## Reading", "", reading] if reading else []),
    ]

    def section(title: str, words: str, *contents: list[str]) -> None:
        body = [line for content in contents for line in content]
        if body:
            lines.extend([f"## {title}", "", words, "", *body])

    section(
        "Training",
        "One seed each. Tokens include landmarks; speed and MFU as [training.md](training.md) counts them; validation "
        "at the trained length.",
        training_table(parts),
    )
    for title, names, corpus in (("novels", NOVELS, "pg19"), ("mathematics", MATH, "arxiv-math")):
        first, second = (study_rows(parts, names, study) for study in ("table1", "table2"))
        section(
            f"Perplexity on {title}",
            "The paper's table 1, and table 2 where it was measured, on the validation split. The paper's figures are "
            f"of {corpus}, by models of 200 million parameters that saw 16 billion tokens.",
            perplexity_table(first, corpus) if first else [],
            perplexity_table(second, corpus) if second else [],
            order_table(first + second, corpus),
        )
    own = {
        "landmark, k = 4": ("landmark/passkey-k4", "million/passkey-k4"),
        "landmark, k = 8": ("landmark/passkey-k8", "million/passkey-k8"),
        "baseline": ("baseline/passkey",),
    }
    section(
        "Pass keys",
        "Share of keys found, with Wilson's 95 % interval. The models were trained on documents of at most 500 tokens, "
        "in the wording and the filler in which they are asked here: this is the skill that was drilled, at lengths "
        "that it was not drilled at. The baseline sees the last 512 tokens.",
        key_section(key_lines(parts, own), folder / "results-passkey.png", 512),
    )
    windows = study_rows(parts, WINDOWS, "perplexity")
    novel_keys = {
        f"{name.removeprefix('windows-')}, k = {k}": (f"{name}/passkey-novels-k{k}",)
        for name in WINDOWS
        for k in (4, 8)
    }
    in_novels = key_lines(parts, novel_keys)
    section(
        "Trained as it reads",
        "The landmark model of the tables above, trained dense in windows of 512 tokens, and by the same recipe on as "
        "many tokens in windows of 16 and 64 thousand, read in chunks of 1000 that retrieve 4 blocks. Each is read by "
        "its default chunk, where no other is named. Keys are asked for in the wording that a quarter of the training "
        "was, but lie in novels of the validation split, which no training saw.",
        perplexity_table(windows, None) if windows else [],
        key_table(in_novels) if in_novels else [],
    )
    pretrained = {
        "untouched": ("smollm2-untouched/passkey",),
        "landmarks, novels": ("smollm2-novels/passkey",),
        "landmarks, novels and pass keys": ("smollm2-passkey/passkey",),
    }
    rows = study_rows(parts, SMOLLM2, "perplexity")
    section(
        "SmolLM2-135M",
        "The untouched model reads novels 8192 tokens at a time, the length it was trained on, and pass-key prompts "
        "whole. With landmarks it was fine-tuned in windows of 1008 tokens and reads all in chunks of 693, k = 4. Keys "
        "are asked for in the paper's wording and filler, on which the model of the last column alone was trained.",
        perplexity_table(rows, None) if rows else [],
        key_section(key_lines(parts, pretrained), folder / "results-smollm2.png", 1008),
    )
    section(
        "RULER",
        "Mean scores of `landmark eval ruler`, by way of reading and tokens of prompt and answer. No training saw a "
        "task's wording; the filler of niah_single_1 and vt is the pass key's. Prose is the validation split of the "
        "novels, not RULER's essays, so figures of tasks with prose are near published ones, not equal to them. "
        "[evaluation.md](evaluation.md#ruler) says what the tasks are.",
        ruler_tables(parts),
    )
    section("Commands", "What ran in every part, and its seconds; some ran at the same time.", commands(parts))
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="the folder of the parts' folders")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    parts = read_parts(options.results)
    if not parts:
        parser.error(f"{options.results} holds no part's results: run recipes/results/run.sh first")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    reading = options.results / "reading.md"
    text = reading.read_text(encoding="utf-8") if reading.exists() else ""
    options.output.write_text(report(parts, options.output.parent, text), encoding="utf-8")
    print(f"wrote {options.output} from {', '.join(parts)}")


if __name__ == "__main__":
    main()
