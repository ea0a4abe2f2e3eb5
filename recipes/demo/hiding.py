"""Facts hidden in a novel, and the questions that ask for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from landmark_cli.data.corpora import SAMPLE_HELD_OUT, novels
from landmark_cli.data.tasks.corpus import SENTENCE_END
from landmark_cli.data.tasks.facts import RELATIONS
from landmark_cli.data.tasks.formats import capital, say
from landmark_cli.data.tasks.kinds import Draw
from landmark_cli.data.tasks.questions import FRAMES
from landmark_cli.data.tasks.vocabulary import pick

FRAME = next(frame for frame in FRAMES if frame.startswith("Q:"))

LAST_PLACE = 0.95


@dataclass(frozen=True)
class Hidden:
    """A fact in a text. sentence: it says so, and begins at character `place`. question: what is put behind the text to
    ask for it, the beginning of the answer included if that is given. value: the answer."""

    sentence: str
    place: int
    question: str
    value: str

    def answered_by(self, text: str) -> bool:
        """Whether a text is the value and nothing else; the full stop and capitals do not count."""
        return text.strip().removesuffix(".").casefold() == self.value.removesuffix(".").casefold()


def held_out_novel() -> str:
    """The novel of the sample that no training sees."""
    return novels()[SAMPLE_HELD_OUT].decode().replace("\r\n", "\n")


def hide_facts(novel: str, count: int, seed: int, *, begun: bool = True) -> tuple[str, list[Hidden]]:
    """A novel with facts put in between its sentences, and these in the order of the text: in each of `count` parts of
    equal length one, at a random place, and none in the novel's last twentieth, which whoever is asked may still see.

    Names and values are drawn from the vocabularies of `landmark prepare tasks`, so that which they are cannot be known
    from anywhere else. begun: whether a question gives the beginning of the answer. A function of all of these.
    """
    generator = np.random.default_rng(seed)
    draw = Draw(generator, novel, count, absent=0.0)
    ends = [match.end() for match in SENTENCE_END.finditer(novel, 0, int(LAST_PLACE * len(novel)))]
    parts, hidden, done = [], [], 0
    for number in range(count):
        fact = draw.fact(draw.relation(RELATIONS))
        sentence = say(fact.relation.says, fact.subject, fact.value, generator)
        end = ends[int((number + generator.random()) / count * len(ends))]
        parts += [novel[done:end], " ", sentence]
        asked = FRAME.format(q=capital(pick(generator, fact.relation.asks).format(s=fact.subject)))
        lead = f" {capital(fact.relation.lead.format(s=fact.subject))}" if begun else ""
        place = sum(map(len, parts)) - len(sentence)
        hidden.append(Hidden(sentence, place, f"\n\n{asked}{lead}", str(fact.value)))
        done = end
    return "".join([*parts, novel[done:]]), hidden
