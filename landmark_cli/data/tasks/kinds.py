"""What is hidden in a text and asked about it: one function for each kind of question."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from landmark_cli.data.tasks.facts import CHAINS, LONG, RELATIONS, REPEATED, Chain, Fact, Relation
from landmark_cli.data.tasks.formats import hide, new, rows_of, say
from landmark_cli.data.tasks.questions import NOT_THERE, Asked, enumeration, sentence
from landmark_cli.data.tasks.vocabulary import Term, pick

MOST_FACTS = 8
MOST_LINKS = 6
# Of facts that are all asked for, in a document of 8 thousand tokens.
MOST_ASKED = 96
MOST_ROWS = 12
MOST_VALUES = 6
MOST_LONG = 4
QUOTED_WORDS = (8, 80)
OPENING_WORDS = (5, 10)

TOGETHER_ASKS = (
    "Give the {key} of each, in this order: {names}.", "{names}: what is the {key}, one by one?",
    "Put down the {key} for {names}.", "For {names}, list the {key}.",
)  # fmt: skip
ALL_VALUES_HINTS = ("", " Keep their order.", " Leave none out.", " Go from first to last.")
ORDER_ASKS = {
    "first": ("Of {names}, which comes up first?", "Which is mentioned before the others: {names}?"),
    "last": ("Of {names}, which comes up last?", "Which is mentioned after all the others: {names}?"),
    "order": ("Put in the order in which they come up: {names}.", "Sort by where they come up: {names}."),
}
QUOTATION_ASKS = (
    "Somewhere one reads: {x} ... How does it go on?", "Copy on from here: {x}", "The words after these, please: {x}",
    "Go on quoting: {x}", "Which words follow? {x}",
)  # fmt: skip


@dataclass
class Task:
    """What to put into a text, and what to ask behind it.

    Attributes:
        hidden: pieces to put in, in the order in which they are to stand.
        asked: questions with their answers.
    """

    hidden: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)


@dataclass(frozen=True)
class Draw:
    """What a task is drawn from.

    generator: of all that is drawn. text: what the task will be hidden in. most: the most facts to hide. absent: the
    share of look-ups that ask for what is not there. taken: names that are in the text or in the task.
    """

    generator: np.random.Generator
    text: str
    most: int
    absent: float
    taken: set[str] = field(default_factory=set)

    @property
    def most_sentences(self) -> int:
        """The most facts where each is a sentence and asked for in one: a third of what a fact is reckoned to take at
        most."""
        return 3 * self.most

    def count(self, least: int, most: int) -> int:
        """A number from `least` to `most`, or to as many as there may be."""
        return int(self.generator.integers(least, max(least, min(most, self.most)) + 1))

    def relation(self, among: tuple[Relation, ...]) -> Relation:
        return among[int(self.generator.integers(len(among)))]

    def fact(self, relation: Relation, like: Fact | None = None) -> Fact:
        """A new fact. like: one from whose subject the new one differs in one word."""
        subject = new(relation.subject, self.generator, self.taken, like and like.subject)
        return Fact(relation, subject, new(relation.value, self.generator, self.taken))

    def hidden(self, facts: list[Fact]) -> list[str]:
        """Each fact in a way of its own."""
        rows = min(4, self.most)
        return [hide(fact, self.generator, self.taken, rows) for fact in facts]

    def shuffled(self, items: list) -> list:
        return [items[i] for i in self.generator.permutation(len(items))]


def look_up(draw: Draw) -> Task:
    """Facts, of which one or several are asked for, beside others that differ in one word. A share of the questions is
    about what is not there."""
    generator = draw.generator
    facts = _facts(draw, RELATIONS, min(MOST_FACTS, draw.most))
    wanted = draw.shuffled(facts)[: draw.count(1, len(facts)) if generator.random() < 0.5 else 1]
    asked = [_not_there(draw, fact) if generator.random() < draw.absent else _about(draw, fact) for fact in wanted]
    return Task(draw.hidden(draw.shuffled(facts)), asked)


def completion(draw: Draw) -> Task:
    """The simplest look-up: facts as sentences of the prose, each asked for by the beginning of a sentence that its
    value ends, half of them with a question in front of it."""
    facts, generator = _facts(draw, RELATIONS, min(MOST_FACTS, draw.most_sentences)), draw.generator
    asked = []
    for fact in draw.shuffled(facts):
        relation, value = fact.relation, sentence(str(fact.value))
        lead = relation.lead.format(s=fact.subject)
        if generator.random() < 0.5:
            asked.append(Asked(lead, value, cloze=True))
        else:
            asked.append(Asked(pick(generator, relation.asks).format(s=fact.subject), value, begun=lead))
    return Task([say(fact.relation.says, fact.subject, fact.value, generator) for fact in draw.shuffled(facts)], asked)


def transcription(draw: Draw) -> Task:
    """Facts whose values take dozens of tokens, one or two of which are to be written down: what is copied goes on in
    the next block, and has to be looked up again for every token."""
    facts = _facts(draw, LONG, min(MOST_LONG, draw.most))
    wanted = draw.shuffled(facts)[: draw.count(1, 2)]
    return Task(draw.hidden(draw.shuffled(facts)), [_about(draw, fact) for fact in wanted])


def _facts(draw: Draw, among: tuple[Relation, ...], most: int) -> list[Fact]:
    """One fact or several, at most `most`. Half of the others differ in a word from one before, a quarter is of another
    relation."""
    relation = draw.relation(among)
    facts = [draw.fact(relation)]
    for _ in range(int(draw.generator.integers(1, most + 1)) - 1):
        kind = draw.generator.random()
        like = facts[int(draw.generator.integers(len(facts)))]
        if kind < 0.5:
            facts.append(draw.fact(like.relation, like))
        else:
            facts.append(draw.fact(relation if kind < 0.75 else draw.relation(among)))
    return facts


def _about(draw: Draw, fact: Fact) -> Asked:
    """A question for the value of a fact, some with the beginning of a sentence for it to end, or such a sentence
    alone, or a question for its subject."""
    relation, drawn = fact.relation, draw.generator.random()
    if drawn < 0.15 and relation.back:
        return Asked(relation.back.format(v=fact.value), sentence(str(fact.subject)))
    lead, value = relation.lead.format(s=fact.subject), sentence(str(fact.value))
    if drawn < 0.4:
        return Asked(lead, value, cloze=True)
    question = pick(draw.generator, relation.asks).format(s=fact.subject)
    return Asked(question, value, begun=lead if drawn < 0.7 else "")


def _not_there(draw: Draw, fact: Fact) -> Asked:
    """A question about somebody whose name differs in one word from one in the text."""
    subject = new(fact.relation.subject, draw.generator, draw.taken, fact.subject)
    return Asked(pick(draw.generator, fact.relation.asks).format(s=subject), pick(draw.generator, NOT_THERE))


def inventory(draw: Draw) -> Task:
    """As many facts as there is room for, all of them asked for, each in a question of its own, in any order: hundreds
    of tokens of such a document can only be known by looking them up, where others have a handful. They are of three
    relations at most, so that most resemble others; some subjects have several values, asked for together."""
    generator = draw.generator
    relations = [draw.relation(RELATIONS + REPEATED) for _ in range(int(generator.integers(1, 4)))]
    # All facts of one subject and relation, in their order.
    groups: list[list[Fact]] = []
    most = min(MOST_ASKED, draw.most_sentences)
    left = int(generator.integers(max(2, most // 4), most + 1))
    while left > 0:
        relation = relations[int(generator.integers(len(relations)))]
        alike = [group[0] for group in groups if group[0].relation is relation]
        like = alike[int(generator.integers(len(alike)))] if alike and generator.random() < 0.5 else None
        group = [draw.fact(relation, like)]
        while relation in REPEATED and len(group) < min(MOST_VALUES, left) and generator.random() < 0.6:
            group.append(Fact(relation, group[0].subject, new(relation.value, generator, draw.taken)))
        groups.append(group)
        left -= len(group)
    owners = draw.shuffled([number for number, group in enumerate(groups) for _ in group])
    after = [iter(group) for group in groups]
    facts = [next(after[number]) for number in owners]
    if generator.random() < 0.4:
        hidden = [rows_of(run, generator) for run in _runs(facts, generator)]
    else:
        hidden = [say(fact.relation.says, fact.subject, fact.value, generator) for fact in facts]
    asked = [_about(draw, group[0]) if len(group) == 1 else _about_all(draw, group) for group in draw.shuffled(groups)]
    return Task(hidden, asked)


def _runs(facts: list[Fact], generator: np.random.Generator) -> Iterator[list[Fact]]:
    """Facts in their order, cut into runs of one relation, none of which names a subject twice."""
    run: list[Fact] = []
    most = 0
    for fact in facts:
        subjects = {str(one.subject) for one in run}
        if run and (len(run) >= most or fact.relation is not run[0].relation or str(fact.subject) in subjects):
            yield run
            run = []
        if not run:
            most = int(generator.integers(1, MOST_ROWS + 1))
        run.append(fact)
    yield run


def together(draw: Draw) -> Task:
    """Facts of one relation, several of them asked for in one question."""
    relation = draw.relation(RELATIONS)
    facts = [draw.fact(relation)]
    for _ in range(draw.count(2, MOST_FACTS) - 1):
        facts.append(draw.fact(relation, facts[0] if draw.generator.random() < 0.5 else None))
    wanted = draw.shuffled(facts)[: draw.count(2, len(facts))]
    names = enumeration([str(fact.subject) for fact in wanted])
    question = pick(draw.generator, TOGETHER_ASKS).format(key=relation.key.replace("_", " "), names=names)
    return Task(draw.hidden(draw.shuffled(facts)), [Asked(question, sentence("; ".join(str(f.value) for f in wanted)))])


def _repeated(draw: Draw) -> tuple[list[Fact], list[Fact]]:
    """Facts about a subject with several values, in their order, and some about one that differs in a word."""
    relation = draw.relation(REPEATED)
    first = draw.fact(relation)
    facts = [first]
    for _ in range(draw.count(1, MOST_VALUES) - 1):
        facts.append(Fact(relation, first.subject, new(relation.value, draw.generator, draw.taken)))
    other = draw.fact(relation, first)
    others = [other] * draw.count(0, 1)
    for _ in range(draw.count(0, 2) if others else 0):
        others.append(Fact(relation, other.subject, new(relation.value, draw.generator, draw.taken)))
    return facts, others


def _in_order(draw: Draw, facts: list[Fact], others: list[Fact]) -> list[str]:
    """Facts in their order, with others between them."""
    places = np.sort(draw.generator.permutation(len(facts) + len(others))[: len(facts)])
    mixed: list[Fact] = list(others)
    for place, fact in zip(places.tolist(), facts, strict=True):
        mixed.insert(place, fact)
    return draw.hidden(mixed)


def all_values(draw: Draw) -> Task:
    """A subject with several values, all of them asked for, in their order."""
    facts, others = _repeated(draw)
    asked = _about_all(draw, facts)
    return Task(_in_order(draw, facts, others), [asked])


def _about_all(draw: Draw, facts: list[Fact]) -> Asked:
    """A question for all values of a subject, as `_about` asks for one."""
    values = enumeration([str(fact.value) for fact in facts])
    relation, subject = facts[0].relation, facts[0].subject
    lead, drawn = relation.lead.format(s=subject), draw.generator.random()
    if drawn < 0.3:
        return Asked(lead, sentence(values), cloze=True)
    question = pick(draw.generator, relation.asks).format(s=subject) + pick(draw.generator, ALL_VALUES_HINTS)
    return Asked(question, sentence(values), begun=lead if drawn < 0.6 else "")


def counting(draw: Draw) -> Task:
    """How many values a subject has."""
    facts, others = _repeated(draw)
    return Task(
        _in_order(draw, facts, others),
        [Asked(facts[0].relation.count.format(s=facts[0].subject), sentence(str(len(facts))))],
    )


def first_or_last(draw: Draw) -> Task:
    """Which of several subjects comes first, or last, or in which order they come."""
    relation = draw.relation(RELATIONS)
    facts = [draw.fact(relation)]
    for _ in range(draw.count(2, 6) - 1):
        facts.append(draw.fact(relation, facts[0] if draw.generator.random() < 0.3 else None))
    names = enumeration([str(fact.subject) for fact in draw.shuffled(facts)])
    order = [str(fact.subject) for fact in facts]
    which = pick(draw.generator, tuple(ORDER_ASKS))
    answer = {"first": order[0], "last": order[-1], "order": ", ".join(order)}[which]
    return Task(
        draw.hidden(facts), [Asked(pick(draw.generator, ORDER_ASKS[which]).format(names=names), sentence(answer))]
    )


def chain(draw: Draw) -> Task:
    """Links from one name to the next, in any order in the text, to be followed a number of steps or to the end, beside
    another chain whose first name differs in one word."""
    kind, names, hidden = _chain(draw, 1)
    links, generator = len(names) - 1, draw.generator
    if links == 1 or generator.random() < 0.4:
        return Task(hidden, [Asked(pick(generator, kind.ends).format(s=names[0]), sentence(str(names[-1])))])
    n = int(generator.integers(2, links + 1))
    return Task(hidden, [Asked(pick(generator, kind.asks).format(s=names[0], n=n), sentence(str(names[n])))])


def whole_chain(draw: Draw) -> Task:
    """Such links, all names of which behind the first are to be listed."""
    kind, names, hidden = _chain(draw, 2)
    question = pick(draw.generator, kind.lists).format(s=names[0])
    return Task(hidden, [Asked(question, sentence(enumeration([str(name) for name in names[1:]])))])


def _chain(draw: Draw, least: int) -> tuple[Chain, list[Term], list[str]]:
    """A kind of chain, the names of one with `least` links or more, and sentences with its links and another's."""
    generator = draw.generator
    kind = CHAINS[int(generator.integers(len(CHAINS)))]
    links = draw.count(least, MOST_LINKS)
    names = [new(kind.term, generator, draw.taken)]
    names += [new(kind.term, generator, draw.taken) for _ in range(links)]
    others = [new(kind.term, generator, draw.taken, names[0])]
    others += [new(kind.term, generator, draw.taken) for _ in range(draw.count(0, links))]
    steps = [pair for run in (names, others) for pair in zip(run, run[1:], strict=False)]
    return kind, names, [say(kind.says, before, after, generator) for before, after in draw.shuffled(steps)]


def quotation(draw: Draw) -> Task:
    """A passage of the text itself, given by how it begins, to be copied on from there."""
    words = list(re.finditer(r"\S+", draw.text))
    opening, quoted = (int(draw.generator.integers(a, b + 1)) for a, b in (OPENING_WORDS, QUOTED_WORDS))
    quoted = min(quoted, max(4, len(words) // 4))
    for _ in range(20):
        first = int(draw.generator.integers(max(1, len(words) - opening - quoted)))
        begun = words[first : first + opening]
        rest = words[first + opening : first + opening + quoted]
        if rest and draw.text.count(draw.text[begun[0].start() : begun[-1].end()]) == 1:
            break
    else:
        return look_up(draw)
    asked = pick(draw.generator, QUOTATION_ASKS).format(x=" ".join(word.group() for word in begun))
    return Task([], [Asked(asked, " ".join(word.group() for word in rest))])


KINDS: tuple[tuple[Callable[[Draw], Task], float], ...] = (
    (look_up, 0.3),
    (together, 0.1),
    (all_values, 0.1),
    (counting, 0.0),
    (first_or_last, 0.0),
    (chain, 0.1),
    (quotation, 0.1),
    (inventory, 0.0),
    (completion, 0.0),
    (transcription, 0.2),
    (whole_chain, 0.1),
)
"""The kinds of questions, and how often each is drawn where none are named: as the best run did (docs/results.md). Four
are drawn only where they are named: counting and order, an inventory, whose dozens of answers have not made a model
better at looking up, and a completion, for models that are too small for the others."""


def draw_task(draw: Draw, kinds: Sequence[str] = ()) -> Task:
    """A task. kinds: the names of those to draw from, all alike often, one that stands twice twice as often; by default
    all, as often as KINDS says."""
    named = {kind.__name__: kind for kind, _ in KINDS}
    if kinds:
        return named[pick(draw.generator, kinds)](draw)
    edges = np.cumsum([share for _, share in KINDS])
    # Sums of shares may end slightly below 1.
    last = int(np.argmax(edges))
    return KINDS[min(int(np.searchsorted(edges, draw.generator.random(), side="right")), last)][0](draw)
