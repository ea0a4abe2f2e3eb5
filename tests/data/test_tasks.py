"""Documents in which something must be found: answers are there, wordings are none of a test's, document i is a
function of seed and i."""

import functools
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from landmark_cli.commands.task_kinds import TaskKind
from landmark_cli.data import passkey
from landmark_cli.data.corpora import sample
from landmark_cli.data.merge import Process
from landmark_cli.data.prepare import prepare
from landmark_cli.data.tasks import facts, formats, kinds, questions
from landmark_cli.data.tasks.corpus import Haystack, TaskDocuments, how_many, insert, tasks_corpus
from landmark_cli.data.tasks.kinds import KINDS, Draw, Task
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from tests.awkward_tokenizers import byte_tokenizer
from tests.data.texts import documents_in, json_lines, taken, write

GPT2 = load_tokenizer("gpt2")
NOVELS = taken([document for split, document in sample().documents() if split == "train"], 1 << 24)[0]
TEXT = NOVELS[0][20_000:32_000]

# RULER's (arXiv 2404.06654) instructions, questions, beginnings of answers and needles.
RULER = [
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {type} afterwards.",
    "A special magic {type} is hidden within the following text.",
    "What are all the special magic {type} for {query} mentioned in the provided text?",
    "What is the special magic {type} for {query} mentioned in the provided text?",
    "The special magic {type} for {query} mentioned in the provided text are",
    "The special magic {type} for {query} mentioned in the provided text is",
    "One of the special magic {type} for {key} is: {value}.",
    "Memorize and track the chain(s) of variable assignment hidden in the following text.",
    "Question: Find all variables that are assigned the value {query} in the text above.",
    "Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are:",
    "VAR {a} = {b} VAR {c} = VAR {a}",
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.",
    "Question: What are the 10 most common words in the above list?",
    "Answer: The top 10 words that appear most often in the list are:",
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words.",
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    "Answer: According to the coded text above, the three most frequently appeared words are:",
    "Answer the question based on the given documents. Only give me the answer and do not output any other words. The "
    "following are given documents.",
    "Question: {query} Answer:",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
]
PASS_KEY = [passkey.TASK, passkey.FILLER, passkey.KEY_LINE, passkey.QUESTION]


def grams(text, blank=None):
    """All four words in a row. blank: what stands for a place to fill in; four with one count too."""
    words = re.findall(r"\w+|\{\w+\}", text.lower())
    found = {tuple("{}" if word.startswith("{") else word for word in words[i : i + 4]) for i in range(len(words) - 3)}
    return {gram for gram in found if blank or "{}" not in gram}


def wordings():
    """Every format string of the modules, and every string of their data."""

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (facts.Relation, facts.Chain)):
            yield from strings(tuple(vars(value).values()))
        elif isinstance(value, dict):
            yield from strings(tuple(value.values()))
        elif isinstance(value, (tuple, list)):
            for one in value:
                yield from strings(one)

    for module in (facts, formats, questions, kinds):
        for name, value in vars(module).items():
            if name.isupper():
                yield from strings(value)
        yield from re.findall(r'"((?:[^"\\\n]|\\.)*)"', inspect.getsource(module))


def test_no_wording_is_a_tests_own():
    forbidden = set().union(*(grams(text, blank=True) for text in (*RULER, *PASS_KEY)))
    assert len(forbidden) > 150
    found = list(wordings())
    assert len(found) > 500
    for wording in found:
        assert not grams(wording, blank=True) & forbidden, wording
        assert not re.search(r"special magic|pass ?key|memorize|quiz you", wording.lower())


def test_no_document_holds_a_tests_words():
    """What is put together of wordings, names and frames too."""
    forbidden = set().union(*(grams(text) for text in (*RULER, *PASS_KEY)))
    generator = np.random.default_rng(0)
    for _ in range(800):
        task = kinds.draw_task(Draw(generator, TEXT, 8, 0.1), [kind.__name__ for kind, _ in KINDS])
        ending = questions.ending(task.asked, generator)
        for text in (*task.hidden, str(ending)):
            assert not grams(text) & forbidden, text


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS], ids=lambda kind: kind.__name__)
def test_answers_can_be_found(kind):
    """Every name in an answer stands in what is hidden, or in the text; numbers are counts of it."""
    generator = np.random.default_rng(1)
    answers = Counter()
    for _ in range(150):
        task = kind(Draw(generator, TEXT, int(generator.integers(1, 9)), 0.0))
        hidden = "\n".join(task.hidden)
        assert task.asked and all(one.question and one.answer for one in task.asked)
        for one in task.asked:
            answers[one.answer] += 1
            if kind is kinds.counting:
                counted = [piece for piece in task.hidden if re.search(_subject(one.question), piece, re.I)]
                assert one.answer == f"{len(counted)}."
            elif kind is kinds.quotation:
                assert one.answer in " ".join(TEXT.split())
            else:
                for name in re.split(r"; |, (?=\D)| and (?=[\w])", one.answer.removesuffix(".")):
                    assert name.lower() in hidden.lower(), (name, hidden)
    assert len(answers) > (4 if kind is kinds.counting else 100)


def test_kinds_are_drawn_as_they_are_named():
    counts = Counter()
    spied = tuple((_spy(kind, counts), share) for kind, share in KINDS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kinds, "KINDS", spied)
        for named in ((), ("completion",), ("look_up", "completion")):
            counts.clear()
            generator = np.random.default_rng(6)
            for _ in range(300):
                kinds.draw_task(Draw(generator, TEXT, 4, 0.0), named)
            assert set(counts) == set(named or [kind.__name__ for kind, share in KINDS if share])
            if named:
                assert max(counts.values()) - min(counts.values()) < 60
            else:
                assert counts["look_up"] == max(counts.values())


def _spy(kind, counts):
    """A kind that counts how often it is drawn."""

    @functools.wraps(kind)
    def counted(draw):
        counts[kind.__name__] += 1
        return kind(draw)

    return counted


def test_the_command_names_every_kind():
    assert get_args(TaskKind) == tuple(kind.__name__ for kind, _ in KINDS)


def test_completions_are_of_prose_and_end_with_the_value():
    generator = np.random.default_rng(7)
    begun = 0
    for _ in range(50):
        task = kinds.completion(Draw(generator, TEXT, 5, 1.0))
        assert len(task.asked) == len(task.hidden)
        for one in task.asked:
            lead = one.question if one.cloze else one.begun
            begun += not one.cloze
            (relation,) = [r for r in facts.RELATIONS if re.fullmatch(re.escape(r.lead).replace(r"\{s\}", ".+"), lead)]
            before, after = relation.lead.split("{s}")
            subject = lead[len(before) : len(lead) - len(after)].lower()
            value = one.answer.removesuffix(".").lower()
            assert any(value in piece.lower() and subject in piece.lower() for piece in task.hidden)
        assert not [piece for piece in task.hidden if "\n" in piece]
    assert begun > 20


def _subject(question):
    """The subject of a question for a count: what stands where the relation has {s}."""
    for relation in facts.REPEATED:
        before, after = relation.count.split("{s}")
        if question.startswith(before) and question.endswith(after):
            return re.escape(question[len(before) : len(question) - len(after)])
    raise AssertionError(question)


def test_all_of_an_inventory_is_asked_for():
    generator = np.random.default_rng(8)
    rows = several = 0
    for _ in range(60):
        task = kinds.inventory(Draw(generator, TEXT, 8, 0.1))
        rows += any("\n" in piece for piece in task.hidden)
        # A question for several values has them all, in the order in which they are told.
        hidden = "\n".join(task.hidden).lower()
        values = [value for one in task.asked for value in re.split(r", (?=\D)| and ", one.answer.removesuffix("."))]
        several += len(values) > len(task.asked)
        assert 6 <= len(values) <= 24
        for one in task.asked:
            told = [hidden.index(value.lower()) for value in re.split(r", (?=\D)| and ", one.answer.removesuffix("."))]
            assert told == sorted(told)
        names = {str(one.question) for one in task.asked}
        assert len(names) == len(task.asked)
    assert rows > 10 and several > 10


def test_no_run_of_rows_names_a_subject_twice():
    """A mapping of JSON would lose the first of its values."""
    generator = np.random.default_rng(9)
    one, other = facts.REPEATED[0], facts.REPEATED[1]
    draw = Draw(generator, TEXT, 8, 0.0)
    first, second = draw.fact(one), draw.fact(one)
    told = [first, second, facts.Fact(one, first.subject, second.value), draw.fact(other)] * 5
    for _ in range(20):
        runs = list(kinds._runs(told, generator))
        assert [fact for run in runs for fact in run] == told
        for run in runs:
            assert len({str(fact.subject) for fact in run}) == len(run) and len({fact.relation for fact in run}) == 1


def test_first_and_last_are_first_and_last():
    generator = np.random.default_rng(2)
    for _ in range(100):
        task = kinds.first_or_last(Draw(generator, TEXT, 8, 0.0))
        (one,) = task.asked
        names = re.search(r"(?:Of |others: )(.*?)(?:, which|\?)", one.question)
        if names:
            named = re.split(r", | and ", names[1])
            text = "\n".join(task.hidden).lower()
            order = sorted(named, key=lambda name: text.index(name.lower()))
            wanted = order[-1] if "last" in one.question or "after" in one.question else order[0]
            assert one.answer == f"{wanted}."


@pytest.mark.parametrize("kind", [kinds.chain, kinds.whole_chain], ids=lambda kind: kind.__name__)
def test_chains_are_followed(kind):
    """The answer, from the links alone."""
    generator = np.random.default_rng(3)
    checked = 0
    for _ in range(100):
        task = kind(Draw(generator, TEXT, 8, 0.0))
        (one,) = task.asked
        links = {}
        for sentence in task.hidden:
            for form in facts.CHAINS[3].says:
                pattern = re.escape(form).replace(r"\{s\}", r"(?P<s>RECORD)").replace(r"\{v\}", r"(?P<v>RECORD)")
                record = r"(?:file|folder|dossier|docket|bundle) [\w./-]*\w"
                if match := re.search(pattern.replace("RECORD", record), sentence, re.I):
                    links[match["s"].lower()] = match["v"].lower()
        if not links:
            continue
        checked += 1
        name = re.search(r"(?:file|folder|dossier|docket|bundle) [\w./-]*\w", one.question, re.I)[0].lower()
        steps = re.search(r"through (\d) rep|, (\d) times", one.question)
        left = int(steps[1] or steps[2]) if steps else 99
        passed = []
        while name in links and left:
            name, left = links[name], left - 1
            passed.append(name)
        wanted = questions.enumeration(passed) if kind is kinds.whole_chain else name
        assert one.answer.lower() == f"{wanted}."
    assert checked > 5


def test_transcriptions_are_of_dozens_of_characters_in_many_shapes():
    generator, shapes = np.random.default_rng(11), Counter()
    asked_back = "|".join(re.escape(one.back).replace(r"\{v\}", ".+") for one in facts.LONG)
    for _ in range(200):
        task = kinds.transcription(Draw(generator, TEXT, 8, 1.0))
        assert 1 <= len(task.asked) <= 2
        # A uuid is what RULER hides.
        assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", "\n".join(task.hidden))
        for one in task.asked:
            if not re.fullmatch(asked_back, one.question):
                value = one.answer.removesuffix(".")
                assert 19 <= len(value) <= 39
                shapes[re.sub(r"[A-Z]", "A", re.sub(r"[0-9a-f]", "h", value))] += 1
    assert len(shapes) == 14


def test_others_differ_in_one_word_and_absent_names_are_absent():
    generator = np.random.default_rng(4)
    absent = close = 0
    for _ in range(200):
        task = kinds.look_up(Draw(generator, TEXT, 8, 1.0))
        hidden = "\n".join(task.hidden).lower()
        for one in task.asked:
            assert one.answer in questions.NOT_THERE
            for relation in facts.RELATIONS:
                for ask in relation.asks:
                    before, after = ask.split("{s}", 1)
                    if "{s}" not in after and one.question.startswith(before) and one.question.endswith(after):
                        name = one.question[len(before) : len(one.question) - len(after)].lower()
                        if name:
                            absent += 1
                            assert name not in hidden
                            words = name.split()
                            gaps = [re.escape(" ".join(words)).replace(re.escape(w), r"\S+", 1) for w in words]
                            close += any(re.search(gap, hidden) for gap in gaps)
    assert absent > 150 and close > 0.9 * absent


def test_pieces_are_spread_and_keep_their_order():
    generator, places = np.random.default_rng(5), []
    for _ in range(200):
        hidden = [f"Piece {i} of them." if i % 2 else f"Row {i}:\n- of lines" for i in range(4)]
        text = insert(TEXT, Task(hidden), generator)
        found = [text.index(piece) for piece in hidden]
        assert found == sorted(found)
        for piece in hidden:
            text = text.replace(piece, "")
        assert text.split() == TEXT.split()
        places += [place / len(TEXT) for place in found]
    assert abs(np.mean(places) - 0.5) < 0.05 and np.histogram(places, 5, (0, 1.1))[0].min() > 100


@pytest.mark.parametrize(
    "text",
    [
        "\n".join("".join(f"第{n}天，我们在河边看见了{n}只船。" for n in range(m, m + 60)) for m in range(0, 3000, 60)),
        " ".join(f"Баржа номер {n} шла вниз по реке." for n in range(3000)),
    ],
    ids=["Chinese", "Russian"],
)
def test_tasks_are_hidden_all_over_text_of_other_scripts(text):
    made = TaskDocuments(Haystack(text, GPT2), GPT2, 0.0, ["look_up"])
    documents = [made.make(2000, [3, i]) for i in range(30)]
    assert len({document.text[:30] for document in documents}) > 20
    assert min(len(GPT2.encode(str(document))) for document in documents) > 1700
    # Whatever of English stands in them is hidden.
    places = [m.start() / len(d.text) for d in documents for m in re.finditer(r"[a-z]{4,}[^a-z]*[.\n]", d.text)]
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > len(places) / 12


@pytest.mark.parametrize("length", [256, 300, 1000, 5000])
def test_lengths(length):
    made = TaskDocuments(Haystack(NOVELS[0], GPT2), GPT2, 0.1)
    lengths = [len(GPT2.encode(str(made.make(length, [0, i])))) for i in range(12)]
    assert max(lengths) <= length and min(lengths) > 0.85 * length - 40


def test_lengths_by_another_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    made = TaskDocuments(Haystack(NOVELS[0], tokenizer), tokenizer, 0.1)
    for length in (2000, 5000):
        lengths = [len(tokenizer.encode(str(made.make(length, [0, i])))) for i in range(12)]
        assert max(lengths) <= length and min(lengths) > 0.9 * length - 40
    with pytest.raises(LandmarkError, match="no task fits into a document of 40 tokens: make --shortest larger"):
        made.make(40, [0, 0])


def test_documents_are_prepared_like_any_corpus(tmp_path):
    settings = {"documents": 60, "shortest": 256, "longest": 900, "validation_share": 0.1}
    written = prepare(tasks_corpus(GPT2, **settings, seed=3), GPT2, tmp_path / "a")
    assert (written["train"].documents, written["validation"].documents) == (54, 6)
    documents = documents_in(TokenFile.open(tmp_path / "a" / "train.bin"))
    lengths = np.log([len(document) + 1 for document in documents])
    assert np.exp(lengths.max()) <= 900 and abs(lengths.mean() - np.log([256, 900]).mean()) < 0.15
    again = prepare(tasks_corpus(GPT2, **settings, seed=3), GPT2, tmp_path / "b")
    other = prepare(tasks_corpus(GPT2, **settings, seed=4), GPT2, tmp_path / "c")
    assert again["train"].sha256 == written["train"].sha256 != other["train"].sha256
    for rank in (1, 0):
        prepare(tasks_corpus(GPT2, **settings, seed=3), GPT2, tmp_path / "d", process=Process(rank, 2))
    assert TokenFile.open(tmp_path / "d" / "train.bin").metadata.sha256 == written["train"].sha256


def test_document_i_is_a_function_of_seed_and_i():
    def texts(**settings):
        corpus = tasks_corpus(GPT2, shortest=256, longest=400, validation_share=0, **settings)
        return [b"".join(document.pieces(1 << 20)) for _, document in corpus.documents()]

    some, more = texts(documents=5), texts(documents=9)
    assert more[:5] == some and len(set(more)) == 9
    backwards = list(tasks_corpus(GPT2, documents=5, shortest=256, longest=400, validation_share=0).documents())[::-1]
    assert [b"".join(document.pieces(1 << 20)) for _, document in backwards] == some[::-1]


def test_haystacks(tmp_path, capsys):
    """The novel that is held out is in no document; an own haystack is; its end is for validation alone."""
    persuasion = next(taken([document], 1 << 24)[0][0] for split, document in sample().documents() if split != "train")
    corpus = tasks_corpus(GPT2, documents=30, shortest=300, longest=600)
    lines = [line for line in persuasion.splitlines() if len(line) > 50]
    made = "\n".join(taken(corpus)[0])
    assert not [line for line in lines if line in made]
    first, last = "The barge drew up at the landing. ", "Snow had fallen on the ridge. "
    source = write(tmp_path / "own.jsonl", json_lines([{"body": first * 190 + last * 12}]))
    settings = {"documents": 12, "shortest": 256, "longest": 300, "validation_share": 0.25}
    corpus = tasks_corpus(GPT2, haystack=[str(source)], text_field="body", **settings)
    for split, document in corpus.documents():
        text = b"".join(document.pieces(1 << 20)).decode()
        assert (last in text) == (split == "validation") and (first in text) == (split == "train"), text
    assert "the haystack for validation has about" in capsys.readouterr().err
    empty = write(tmp_path / "empty.txt", "\n")
    with pytest.raises(LandmarkError, match="there is no text in the haystack"):
        tasks_corpus(GPT2, haystack=[str(empty)])
    bad = write(tmp_path / "bad.txt", b"\xff\xfe\x00")
    with pytest.raises(LandmarkError, match="not UTF-8 .*--on-bad-text skip"):
        tasks_corpus(GPT2, haystack=[str(bad)])
    with pytest.raises(LandmarkError, match="there is no text in the haystack"):
        tasks_corpus(GPT2, haystack=[str(bad)], skip_bad_text=True)


@pytest.mark.parametrize(("shortest", "longest"), [(50, 400), (400, 300)])
def test_documents_that_cannot_be(shortest, longest):
    with pytest.raises(UsageError, match="cannot be: the shortest takes 256"):
        tasks_corpus(GPT2, shortest=shortest, longest=longest)


def test_the_docs_say_how_many_there_are():
    page = (Path(__file__).parents[2] / "docs/preparing.md").read_text(encoding="utf-8")
    for name, number in how_many().items():
        assert f"| {name} | {number:,} |" in page, name
