"""How facts stand in a text: in a sentence of it, in dialogue, or in a list, JSON, a table or code of their own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence

import numpy as np

from landmark_cli.data.tasks.facts import Chain, Fact, Relation
from landmark_cli.data.tasks.vocabulary import FIRST_NAMES, VOCABULARIES, Term, Vocabulary, pick

PROSE = (
    "{S}.", "{S}, as everybody knew.", "It ought to be said that {s}.", "By then {s}.", "{S}, or so the clerk wrote.",
    "Somebody added that {s}.", "In those days {s}.", "{S}; that much was certain.", "On an envelope stood: {s}.",
    "{S}, which surprised nobody.", "To be exact, {s}.", "There was talk that {s}.", "Now {s}, though few cared.",
    "Years later people still said that {s}.", "{S}, according to the steward.", "It turned out that {s}.",
    "Among other things, {s}.", "{S}, and there was an end of it.", "The newspaper reported that {s}.",
    "If one could trust the porter, {s}.", "{S}. No more was heard about it.", "Incidentally, {s}.",
    "{S} (a footnote says so).", "One line in the diary reads: {s}.",
)  # fmt: skip
"""Ways for a sentence to stand in prose: {s} is the sentence, {S} the sentence with a capital letter."""

DIALOGUE = (
    '"{ask}" asked {a}. "{S}," said {b}.', '{a}: {ask}\n{b}: {S}.', '"{ask}"\n"{S}."',
    '"I hear that {s}," {a} remarked.', '"{S}," whispered {a}. "Are you sure?" asked {b}. "Quite sure."',
    '{a} turned round. "{ask}" {b} had to think. "{S}, I believe."', '"Tell {b} that {s}," called {a}.',
    '{a} wrote to {b}: "{S}."', '- {ask}\n- {S}.', '"{S}!" cried {a}, and {b} nodded.',
    'Interviewer: {ask}\n{b}: Well, {s}.', '"Did you know," said {a}, "that {s}?"',
)  # fmt: skip
"""Ways for a sentence, or a question and a sentence, to stand in dialogue of {a} and {b}."""

HEADINGS = (
    "Extract from the register ({key})", "{key}:", "Notes, {key}", "Appendix: {key}", "List of entries by {key}",
    "# {key}", "== {key} ==", "[{key}]", "Inventory, column {key}", "Memorandum on {key}",
)  # fmt: skip
ROWS = (
    "- {s}: {v}",
    "* {s} ({v})",
    "{s} - {v}",
    "{s} .... {v}",
    "{s}; {v}",
    "> {s} => {v}",
    "{v} <- {s}",
    "+ {s} | {v}",
)

Rows = Sequence[tuple[str, str]]


def _listed(key: str, rows: Rows, generator: np.random.Generator) -> str:
    heading, row = pick(generator, HEADINGS).format(key=key.replace("_", " ")), pick(generator, ROWS)
    return "\n".join([heading, *(row.format(s=s, v=v) for s, v in rows)])


def _numbered(key: str, rows: Rows, generator: np.random.Generator) -> str:
    first, heading = int(generator.integers(1, 90)), pick(generator, HEADINGS).format(key=key.replace("_", " "))
    return "\n".join([heading, *(f"{first + i}. {s}: {v}" for i, (s, v) in enumerate(rows))])


def _json_objects(key: str, rows: Rows, generator: np.random.Generator) -> str:
    indent = (None, 2)[int(generator.integers(2))]
    return json.dumps([{"name": s, key: v} for s, v in rows], indent=indent, ensure_ascii=False)


def _json_mapping(key: str, rows: Rows, generator: np.random.Generator) -> str:
    indent = (None, 4)[int(generator.integers(2))]
    return json.dumps({key: dict(rows)}, indent=indent, ensure_ascii=False)


def _json_lines(key: str, rows: Rows, generator: np.random.Generator) -> str:
    return "\n".join(json.dumps({"subject": s, "field": key, "content": v}, ensure_ascii=False) for s, v in rows)


def _markdown_table(key: str, rows: Rows, generator: np.random.Generator) -> str:
    return "\n".join([f"| entry | {key} |", "|---|---|", *(f"| {s} | {v} |" for s, v in rows)])


def _aligned_table(key: str, rows: Rows, generator: np.random.Generator) -> str:
    width = max(len(s) for s, _ in rows) + 3
    return "\n".join(f"{s:<{width}}{v}" for s, v in [("entry", key), *rows])


def _csv_table(key: str, rows: Rows, generator: np.random.Generator) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([("entry", key), *rows])
    return written.getvalue().rstrip("\n")


def _html_table(key: str, rows: Rows, generator: np.random.Generator) -> str:
    cells = "\n".join(f"<tr><td>{s}</td><td>{v}</td></tr>" for s, v in rows)
    return f'<table title="{key}">\n{cells}\n</table>'


def _python_mapping(key: str, rows: Rows, generator: np.random.Generator) -> str:
    return "\n".join([f"{key} = {{", *(f"    {s!r}: {v!r}," for s, v in rows), "}"])


def _python_calls(key: str, rows: Rows, generator: np.random.Generator) -> str:
    name = pick(generator, ("record.set", "add", "db.put", "assert_equal", "register"))
    return "\n".join(f"{name}({s!r}, {key}={v!r})" for s, v in rows)


def _ini_section(key: str, rows: Rows, generator: np.random.Generator) -> str:
    return "\n".join([f"[{key}]", *(f"{s} = {v}" for s, v in rows)])


def _yaml_mapping(key: str, rows: Rows, generator: np.random.Generator) -> str:
    return "\n".join([f"{key}:", *(f'  "{s}": "{v}"' for s, v in rows)])


def _sql_rows(key: str, rows: Rows, generator: np.random.Generator) -> str:
    return "\n".join(f"INSERT INTO {key} (entry, content) VALUES ('{s}', '{v}');" for s, v in rows)


BLOCKS: tuple[Callable[[str, Rows, np.random.Generator], str], ...] = (
    _listed, _listed, _numbered, _json_objects, _json_mapping, _json_lines, _markdown_table, _aligned_table, _csv_table,
    _html_table, _python_mapping, _python_calls, _ini_section, _yaml_mapping, _sql_rows,
)  # fmt: skip
"""Blocks of their own: rows of a subject and its value, under what the values are called."""
MOST_OTHER_ROWS = 4


def capital(text: str) -> str:
    """A text that begins a sentence."""
    return text[:1].upper() + text[1:]


def say(says: Sequence[str], subject: Term, value: Term, generator: np.random.Generator) -> str:
    """A sentence in prose, by one of several wordings."""
    sentence = pick(generator, says).format(s=subject, v=value)
    return pick(generator, PROSE).format(s=sentence, S=capital(sentence))


def speak(relation: Relation, fact: Fact, generator: np.random.Generator) -> str:
    """A fact in dialogue."""
    sentence = pick(generator, relation.says).format(s=fact.subject, v=fact.value)
    ask = capital(pick(generator, relation.asks).format(s=fact.subject))
    a, b = generator.permutation(len(FIRST_NAMES))[:2]
    return pick(generator, DIALOGUE).format(
        s=sentence, S=capital(sentence), ask=ask, a=FIRST_NAMES[a], b=FIRST_NAMES[b]
    )


def block(fact: Fact, generator: np.random.Generator, taken: set[str], most: int = MOST_OTHER_ROWS) -> str:
    """A fact as a row of a block; other rows are of other subjects. taken: the names that no other row may have, to
    which its own are added."""
    relation, facts = fact.relation, [fact]
    for _ in range(int(generator.integers(most + 1))):
        subject = new(relation.subject, generator, taken)
        facts.append(Fact(relation, subject, new(relation.value, generator, taken)))
    return rows_of([facts[i] for i in generator.permutation(len(facts))], generator)


def rows_of(facts: Sequence[Fact], generator: np.random.Generator) -> str:
    """Facts of one relation as the rows of a block, in their order. Each is about a subject of its own."""
    rows = [(str(fact.subject), str(fact.value)) for fact in facts]
    return pick(generator, BLOCKS)(facts[0].relation.key, rows, generator)


def hide(fact: Fact, generator: np.random.Generator, taken: set[str], most: int = MOST_OTHER_ROWS) -> str:
    """A fact in any of these ways. taken, most: see `block`."""
    drawn = generator.random()
    if drawn < 0.4:
        return say(fact.relation.says, fact.subject, fact.value, generator)
    if drawn < 0.65:
        return speak(fact.relation, fact, generator)
    return block(fact, generator, taken, most)


def new(kind: str, generator: np.random.Generator, taken: set[str], like: Term | None = None) -> Term:
    """A term of a vocabulary that is not taken yet, and is now. like: the term from which it differs in one word."""
    vocabulary: Vocabulary = VOCABULARIES[kind]
    while True:
        term = vocabulary.draw(generator) if like is None else vocabulary.differing(like, generator)
        if str(term) not in taken:
            taken.add(str(term))
            return term


def ways_to_state(relation: Relation | Chain) -> int:
    """In how many ways a fact of this relation can stand in a text, the other rows of blocks aside."""
    prose = len(PROSE) * len(relation.says)
    if isinstance(relation, Chain):
        return prose
    speakers = len(FIRST_NAMES) * (len(FIRST_NAMES) - 1)
    dialogue = 0
    for form in DIALOGUE:
        asked = len(relation.asks) if "{ask}" in form else 1
        named = ("{a}" in form) + ("{b}" in form)
        dialogue += len(relation.says) * asked * (1, len(FIRST_NAMES), speakers)[named]
    return prose + dialogue + len(set(BLOCKS))
