"""What recipes/results/run.sh measured, as one page with its pictures.

    python recipes/results/report.py runs/results --output docs/results.md

The folder holds one folder for each part: tables of perplexities (table1.json, ...), pass keys (passkey*.json), RULER's
tasks (ruler*.json, of which the answers are not needed), what training wrote (metrics.jsonl), the commands with their
seconds (log.tsv) and, where more has to be said of it, about.md. Variants of a part (options.txt: what they change)
have folders in its own; what a study found of each is in measured.json, and by blocks in blocks.json. What is not there
is left out. A reading.md, what somebody makes of the figures, comes first.
study_parts.py reads the folders, study_tables.py makes the tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from study_parts import GEMMA3, MADE_OF, MATH, NOVELS, PARTS, RULER, SMOLLM2, WINDOWS, Parts, read_parts
from study_tables import (
    blocks_table,
    key_lines,
    key_section,
    key_table,
    one_text_of_keys,
    one_text_of_ruler,
    order_table,
    perplexity_table,
    ruler_tables,
    study_rows,
    training_table,
    variants_table,
)


def commands(parts: Parts) -> list[str]:
    """Every command of every part with its seconds."""
    lines = []
    for part in parts.values():
        total = "" if part.seconds is None else f", {part.seconds} s in all"
        lines += [
            f"{part.name}: {PARTS[part.name]}{total}",
            "",
            *(f"    {s:>4} s  {line}" for one in (part, *part.variants.values()) for s, line in one.commands),
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
        "By the recipe of the landmark model above: trained dense in windows of 512 tokens, and on as many tokens in "
        "windows of 16 and 64 thousand, read in chunks of 1000 that retrieve 4 blocks. Each is read by its default "
        "chunk, where no other is named. Keys are asked for in the wording that a quarter of the training was, but lie "
        f"in novels of the validation split, which no training saw.{one_text_of_keys(parts, novel_keys)}",
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
        f"[evaluation.md](evaluation.md#ruler) says what the tasks are.{one_text_of_ruler(parts, RULER)}",
        ruler_tables(parts, RULER),
    )

    def asked(name: str, part: str) -> dict[str, tuple[str, ...]]:
        further = f"{part}/passkey-novels-k16", f"{part}/passkey-novels-long"
        return {name: (f"{part}/passkey-novels",), f"{name}, k = 16": further}

    sources = {
        "untouched, full attention": ("ruler-untouched/passkey-novels",),
        **asked("distilled", "ruler-distilled"),
        **asked("short values", "ruler-short-values"),
        **asked("the ordinary loss weighing 0.4", "ruler-text-0.4"),
        **asked("without the ordinary loss", "ruler-text-0"),
        **asked("blocks of 32", "ruler-block-32"),
        **asked("grouped", "ruler-grouped"),
        "grouped, chunks of 2016": ("ruler-distilled-64k/passkey-novels-before",),
        **asked("then in windows of 64k", "ruler-distilled-64k"),
        **asked("grouped, answers weighing 0", "ruler-answers-0"),
    }
    of_ruler = key_lines(parts, sources)
    section(
        "Pass keys in novels",
        "Keys that lie in novels of the validation split, asked of the models above in a wording that none of their "
        "training had. Each reads with 12 blocks and by its own chunk where nothing else is said: 7245 text tokens, "
        f"distilled in windows of 8192 positions, and 2016, trained as it reads.{one_text_of_keys(parts, sources)}",
        key_table(of_ruler) if of_ruler else [],
    )
    section(
        "What distillation is made of",
        "The recipe of the distilled model above in short, and with one change at a time, once with two, all on as "
        "many tokens of text; seconds are of a whole run, its start among them. Divergence, of which at most 0.05 is "
        "asked for, is KL(untouched || trained) in nats a token on novels that no training saw, in windows of the "
        "length that the run was trained at: between rows of other windows it does not compare. In the same novels "
        "are perplexity, RULER (the mean of some tasks, with its bootstrapped 95 % interval) and pass keys (the "
        "share found, with Wilson's), read by the default chunk and the blocks that were trained for; keys are asked "
        "for in a wording that no training had, and their lengths count text tokens. Answers are those of tasks of "
        "the run's own kind, in text that is held out: the share of their tokens ranked first. Where the windows are "
        "longer than the untouched model's positions, it is asked about their beginning alone.",
        variants_table(parts[MADE_OF]) if MADE_OF in parts else [],
        blocks_table(parts[MADE_OF]) if MADE_OF in parts else [],
    )
    section(
        "Gemma 3 270M",
        "A model whose layers see 512 tokens but for every sixth, which sees everything and has the landmarks. RULER "
        "as above; untouched it reads with full attention, up to its 32,768 positions."
        f"{one_text_of_ruler(parts, GEMMA3)}",
        ruler_tables(parts, GEMMA3),
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
