"""Tables and pictures of the page that report.py makes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from study_parts import PARTS, UNCHANGED, Part, Parts


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
        rows.append(
            [
                PARTS[part.name],
                f"{last['step']:,}",
                f"{last['tokens'] / 1e6:.0f}M",
                last["loss"],
                validation[-1] if validation else None,
                speed(part),
                f"{statistics.median(mfu):.1%}" if mfu else None,
                f"{last['peak_memory'] / 2**30:.1f} GiB",
                f"{part.training_seconds} s" if part.training_seconds is not None else None,
            ]
        )
    return markdown(columns, rows) if rows else []


def speed(part: Part) -> str | None:
    """Tokens a second, the median of the records but the first."""
    steps = [record for record in part.training if "loss" in record]
    found = [record["tokens_per_second"] for record in steps[1:] or steps]
    return f"{statistics.median(found):,.0f}" if found else None


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


# RULER's tasks that hide what they ask for in prose.
PROSE_TASKS = "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"


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


def one_text_of_keys(parts: Parts, sources: dict[str, Sequence[str]]) -> str:
    """What is to be said where prompts of a length were made of one text, as they once were: their trials have no
    beginning. Arguments: as of `key_lines`."""

    def is_one(place: str) -> bool:
        name, _, file = place.partition("/")
        keys = parts[name].keys.get(file, {}) if name in parts else {}
        return bool(keys.get("haystack")) and any(trial.get("begin") is None for trial in keys["trials"])

    measured = [label for label, line in key_lines(parts, sources).items() if line]
    return _one_text([label for label in measured if any(map(is_one, sources[label]))], measured)


def one_text_of_ruler(parts: Parts, names: Sequence[str]) -> str:
    """The same of these parts' tasks with prose."""
    cells = {
        PARTS[name].removeprefix("RULER, "): [
            cell
            for one in (parts[name], *parts[name].variants.values())
            for file in one.ruler.values()
            for cell in file.get("cells", ())
        ]
        for name in names
        if name in parts
    }
    measured = [label for label, some in cells.items() if some]
    return _one_text([label for label in measured if any(map(_is_one_text, cells[label]))], measured)


def _is_one_text(cell: dict[str, Any]) -> bool:
    return cell["task"] in PROSE_TASKS and "begins" not in cell


def _one_text(labels: list[str], measured: list[str]) -> str:
    if not labels:
        return ""
    whose = "" if labels == measured else f" ({'; '.join(labels)})"
    return (
        f" All prompts in prose{whose} that have one length have the same text, its beginning: figures and intervals "
        "tell of other questions and depths in that text, not of other texts."
    )


def key_table(lines: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Keys found by length, with Wilson's 95 % interval."""

    lengths = sorted({length for line in lines.values() for length in line})
    rows = [
        [f"{length:,}", *(key_cell(line[length]) if length in line else "" for line in lines.values())]
        for length in lengths
    ]
    return markdown(["tokens", *lines], rows)


def key_cell(one: dict[str, Any]) -> str:
    """Keys found of those asked for, with Wilson's 95 % interval of their share."""
    low, high = one["interval"]
    return f"{one['found']}/{one['prompts']} = {one['accuracy']:.0%} ({low:.2f}-{high:.2f})"


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


def ruler_tables(parts: Parts, names: Sequence[str]) -> list[str]:
    """For each model of these parts a table of RULER's scores: a row for each task, a column for each way of reading
    and length."""
    lines = []
    for part in (parts[name] for name in names if name in parts and parts[name].ruler):
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


def last(part: Part, *names: str) -> float | None:
    """The last figure that training wrote by the first of these names that it wrote."""
    found = [[record[name] for record in part.training if record.get(name) is not None] for name in names]
    return next((figures[-1] for figures in found if figures), None)


def _perplexity(one: dict[str, Any]) -> str | None:
    return None if one.get("perplexity") is None else f"{one['perplexity']:.2f}"


def _score(one: dict[str, Any]) -> str | None:
    """RULER's mean of the tasks, with its bootstrapped 95 % interval."""
    return None if one["score"] is None else "{:.2f} ({:.2f}-{:.2f})".format(one["score"], *one["interval"])


# What a row of a study of several things measured -> what its column is called, and its cell of a result.
MEASURED: dict[str, tuple[str, str, Callable[[dict[str, Any]], str | None]]] = {
    "perplexity": ("perplexity", "eval-length", _perplexity),
    "ruler": ("RULER", "length", _score),
    "passkey": ("pass keys", "length", key_cell),
}


def measured(part: Part, study: str) -> dict[str | None, dict[tuple[str, int], str | None]]:
    """What a study of perplexity, RULER and pass keys found of one model: number of blocks retrieved, where rows say it
    -> (kind, length) -> cell, in the rows' order."""
    found: dict[str | None, dict[tuple[str, int], str | None]] = {}
    for row in part.tables.get(study, {"rows": []})["rows"]:
        _, length, cell = MEASURED[row["kind"]]
        of_way = found.setdefault(row["settings"].get("top-k-blocks"), {})
        of_way[row["kind"], row["settings"][length]] = cell(row["result"]) if row["result"] else None
    return found


def measured_columns(found: Iterable[dict[tuple[str, int], str | None]]) -> list[tuple[str, int]]:
    """(kind, length) of all that was measured: kind by kind, the shorter lengths first."""
    kinds = list(MEASURED)
    return sorted({column for of_one in found for column in of_one}, key=lambda one: (kinds.index(one[0]), one[1]))


def column_names(columns: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{MEASURED[kind][0]} at {length:,}" for kind, length in columns]


def variants_table(part: Part) -> list[str]:
    """What became of a recipe with each change, and of the untouched model."""
    everyone = [part, *part.variants.values()]
    # Each is read in its own way here.
    found = [measured(one, "measured").get(None, {}) for one in everyone]
    measures = measured_columns(found)
    if not measures:
        return []
    columns = ["change", "steps", "divergence", *column_names(measures)]
    columns += ["answers' loss", "answers right", "tokens/s", "seconds"]
    rows = []
    for one, of_one in zip(everyone, found, strict=True):
        cells = [of_one.get(column) for column in measures]
        if one is part:
            if any(cells):
                rows.append(["(untouched, read whole)", None, None, *cells, *[None] * 4])
            continue
        if not one.training:
            continue
        # Where no text has answers, all of it is prose.
        divergence = last(one, "validation_prose_divergence", "validation_divergence")
        rows.append(
            [
                f"`{one.options}`" if one.options else "none: the recipe",
                last(one, "step"),
                None if divergence is None else f"{divergence:.3f}",
                *cells,
                last(one, "validation_answers_loss"),
                _answers_right(one),
                speed(one),
                one.training_seconds,
            ]
        )
    said = _asked([row for one in everyone for row in one.tables.get("measured", {"rows": []})["rows"]])
    return [*([part.about, ""] if part.about else []), *markdown(columns, rows), *said]


def _answers_right(part: Part) -> str | None:
    """The share of the answers' tokens, and how many they are where that was noted."""
    right, tokens = last(part, "validation_answers_right"), last(part, "validation_answers_tokens")
    return None if right is None else f"{right:.1%}" + (f" of {tokens:,}" if tokens else "")


def _asked(rows: list[dict[str, Any]]) -> list[str]:
    """Which of RULER's tasks were asked, and how often each."""
    asked = [row["result"] for row in rows if row["kind"] == "ruler" and row["result"] and row["result"]["tasks"]]
    tasks = ", ".join(dict.fromkeys(task for result in asked for task in result["tasks"]))
    samples = sorted({result["answers"] // len(result["tasks"]) for result in asked})
    return [f"RULER: {tasks}, {' or '.join(map(str, samples))} of each.", ""] if asked else []


def blocks_table(part: Part) -> list[str]:
    """What the unchanged recipe's model is asked, by the blocks that it is read with."""
    unchanged = part.variants.get(UNCHANGED)
    found = measured(unchanged, "blocks") if unchanged else {}
    if not found:
        return []
    columns = measured_columns(found.values())
    rows = [[f"top-k {blocks}", *(of_way.get(column) for column in columns)] for blocks, of_way in found.items()]
    return markdown(["the recipe's model, read with", *column_names(columns)], rows)
