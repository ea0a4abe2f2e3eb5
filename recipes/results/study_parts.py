"""What each part of recipes/results/run.sh left in its folder (report.py says what that is)."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    "ruler-short-values": "RULER, the same distillation with tasks of short values alone",
    "ruler-text-0.4": "RULER, that one with the ordinary loss weighing 0.4",
    "ruler-text-0": "RULER, that one without the ordinary loss",
    "ruler-block-32": "RULER, distilled in blocks of 32, as many of them read as of blocks of 64",
    "ruler-grouped": "RULER, the one without the ordinary loss, with the grouped softmax",
    "ruler-distilled-64k": "RULER, the grouped model going on in windows of 64k, trained as it reads",
    "ruler-answers-0": "RULER, the grouped one with answers weighing no more than other text",
    "made-of": "that distillation in short, one change at a time",
    "gemma3-untouched": "RULER, Gemma 3 270M as it is",
    "gemma3-distilled": "RULER, Gemma 3 270M with landmarks by distillation from itself",
}
NOVELS, WINDOWS, MATH, SMOLLM2, RULER, GEMMA3 = (
    ("landmark", "baseline", "xl"),
    ("windows-dense", "windows-16k", "windows-64k"),
    ("math-landmark", "math-baseline", "math-xl"),
    ("smollm2-untouched", "smollm2-novels", "smollm2-passkey"),
    (
        *("ruler-untouched", "ruler-recipe", "ruler-distilled", "ruler-short-values", "ruler-text-0.4"),
        *("ruler-text-0", "ruler-block-32", "ruler-grouped", "ruler-distilled-64k", "ruler-answers-0"),
    ),
    ("gemma3-untouched", "gemma3-distilled"),
)
MADE_OF, UNCHANGED = "made-of", "best"


@dataclass
class Part:
    """What one part left. tables, keys, ruler: the JSON of its studies, of its pass keys and of RULER, by the file's
    name. about: what else is to be said of it.

    training: the records of metrics.jsonl. commands: (seconds, command) in their order; seconds: of the whole part.
    options: what a variant changes, in a part that has some; variants: of this part, by name, the unchanged one first.
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
    options: str = ""
    variants: dict[str, Part] = field(default_factory=dict)

    @property
    def training_seconds(self) -> int | None:
        """Of the commands that train."""
        taken = [seconds for seconds, line in self.commands if line.startswith(("landmark train", "landmark fine"))]
        return sum(taken) if taken else None


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
    of_variants = {path.parent.name: path.parent for path in folder.glob("*/options.txt")}
    for name in _in_order(folder, of_variants):
        part.variants[name] = read_part(of_variants[name])
    for path in folder.glob("options.txt"):
        part.options = path.read_text(encoding="utf-8").strip()
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


def _in_order(folder: Path, variants: Iterable[str]) -> list[str]:
    """Names of a part's variants: the unchanged one, the others as order.txt has them, those behind that it does not
    have."""
    listed = folder / "order.txt"
    known = [UNCHANGED, *(listed.read_text(encoding="utf-8").split() if listed.exists() else ())]
    return sorted(variants, key=lambda name: (known.index(name) if name in known else len(known), name))
