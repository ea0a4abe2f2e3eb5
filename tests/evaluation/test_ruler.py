"""RULER's tasks against their definitions: counts, wordings, exact lengths, where things are hidden, bad input."""

import ast
import functools
import json
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import landmark_cli
from landmark_cli.data import corpora
from landmark_cli.data.passkey import FILLER
from landmark_cli.data.pretrained_tokenizers import text_ids
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.evaluation.ruler import haystacks, words
from landmark_cli.evaluation.ruler.benchmark import ALL, GENERATED, check_lengths, task_names
from landmark_cli.evaluation.ruler.encoding import PromptEncoder
from landmark_cli.evaluation.ruler.haystacks import Prose, TooShort, sentences_of
from landmark_cli.evaluation.ruler.lists import zeta_counts
from landmark_cli.evaluation.ruler.needles import NEEDLE_TASKS, NeedleTask
from tests.awkward_tokenizers import BEGIN, byte_tokenizer
from tests.evaluation.ruler import GPT2, LENGTHS, LENGTHS_OF_CWE, tasks_of, tokenizer_of

PACKAGE = Path(landmark_cli.__file__).parent
NUMBER, UUID = r"[1-9]\d{6}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z][a-z .'-]*-[a-z][a-z .'-]*"


@pytest.fixture(scope="module")
def tasks():
    return tasks_of(GPT2)


@pytest.fixture(scope="module", params=list(LENGTHS))
def in_two_tokenizers(request):
    tokenizer = tokenizer_of(request.param)
    return request.param, tokenizer, tasks_of(tokenizer)


@pytest.mark.parametrize("name", GENERATED)
def test_lengths_are_exact_and_questions_the_same(in_two_tokenizers, name):
    kind, tokenizer, tasks = in_two_tokenizers
    lengths = LENGTHS_OF_CWE[kind] if name == "cwe" else LENGTHS[kind]
    task, same, other = tasks[name], *(tasks_of(tokenizer, [name], seed=seed)[name] for seed in (0, 1))
    for sample in (0, 2):
        prompts = [task.make(sample, length) for length in lengths]
        for prompt, length in zip(prompts, lengths, strict=True):
            assert len(prompt.tokens) + task.new_tokens == length
            # What a tokenizer would have made of the text as a whole, but where the haystack was cut in a word.
            text = tokenizer.decode(prompt.tokens[len(task.encoder.begin) :])
            whole = [*task.encoder.begin, *text_ids(tokenizer, text)]
            assert abs(len(whole) - length + task.new_tokens) <= 2
        short, long = prompts
        assert short.references == long.references
        assert len(short.references) == len(set(short.references))
        ends = [tokenizer.decode(prompt.tokens).rsplit("\n", 1)[1] for prompt in prompts]
        assert ends[0] == ends[1]
    assert (same.make(2, lengths[0]).tokens == short.tokens).all()
    assert other.make(2, lengths[0]).references != short.references


@pytest.mark.parametrize("name", NEEDLE_TASKS)
def test_needles(tasks, name):
    hidden = NEEDLE_TASKS[name]
    kind = hidden.value_kind
    needle = rf"One of the special magic {kind} for (.*?) is: (.*?)\."
    for sample in range(8):
        prompt = tasks[name].make(sample, 1500)
        text = GPT2.decode(prompt.tokens)
        asked = hidden.asked * hidden.values
        found = re.findall(needle, text)
        # The last of the other needles may be cut.
        others = len(found) - hidden.keys * hidden.values
        assert (others > 5) if hidden.haystack == "needles" else others == 0
        assert len(prompt.references) == len(prompt.depths) == asked
        some = "Some special magic {}s are" if asked > 1 else "A special magic {} is"
        assert text.startswith(some.format(kind[:-1]) + " hidden within the following text. Make sure to memorize it.")
        question = re.search(
            r"\nWhat (are all|is) the special magic (\w+) for (.*) mentioned in the provided text\? "
            r"The special magic (\w+) for (.*) mentioned in the provided text (are|is)$",
            text,
        )
        assert question[1] == ("are all" if asked > 1 else "is") and question[3] == question[5]
        assert question[2] == question[4] == (kind if asked > 1 else kind[:-1])
        queries = re.split(r", and |, ", question[3])
        assert len(queries) == hidden.asked
        by_key = {query: [value for key, value in found if key == query] for query in queries}
        assert sorted(value for values in by_key.values() for value in values) == sorted(prompt.references)
        assert {len(values) for values in by_key.values()} == {hidden.values}
        for value in prompt.references:
            assert text.count(value) == 1 and re.fullmatch(NUMBER if kind == "numbers" else UUID, value)
        assert all(re.fullmatch(WORDS if hidden.key_kind == "words" else UUID, query) for query in queries)
        assert (FILLER in text) == (hidden.haystack == "filler")
        # Around the needles, novels.
        parts = re.split(r" ?One of the special magic \w+ for .*? is: .*?\.", text.split("\n")[1])
        longest = max(parts, key=len).strip()
        assert (len(longest) > 200 and longest in novels()) == (hidden.haystack == "prose")
        assert (prompt.begin is not None) == (hidden.haystack == "prose")


@functools.cache
def novels():
    """The text of the shipped novels in which short prompts are made, as prose has it."""
    return GPT2.decode(Prose(PromptEncoder(GPT2)).units().take(150_000)[0])


@pytest.mark.parametrize("name", [name for name, hidden in NEEDLE_TASKS.items() if hidden.haystack == "prose"])
def test_samples_have_stretches_of_their_own(tasks, name):
    """Samples that all end in the same words are one sample, however many they are."""
    prompts = [tasks[name].make(sample, 1200) for sample in range(10)]
    begins = [prompt.begin for prompt in prompts]
    assert len(set(begins)) == 10
    question = GPT2.decode(prompts[0].tokens).rindex("\nWhat")
    ends = {GPT2.decode(prompt.tokens).rsplit("\nWhat", 1)[0][-200:] for prompt in prompts}
    assert len(ends) == 10 and question > 2000
    # The same at every length, and whatever was read before.
    fresh = NeedleTask(name, PromptEncoder(GPT2), 0, Prose(PromptEncoder(GPT2)))
    assert [fresh.make(sample, 700).begin for sample in (3, 0)] == [begins[3], begins[0]]
    assert [tasks[name].make(sample, 2500).begin for sample in (3, 0)] == [begins[3], begins[0]]
    assert tasks_of(GPT2, [name], seed=1)[name].make(3, 1200).begin != begins[3]


def test_novels_begin_in_the_one_that_is_held_out():
    prose, generator = Prose(PromptEncoder(GPT2)), np.random.default_rng(0)
    begins = [prose.draw(generator) for _ in range(400)]
    held_out = len(text_ids(GPT2, " ".join(corpora.novels()[corpora.SAMPLE_HELD_OUT].decode().split())))
    assert max(begins) < 1.02 * held_out
    share = np.histogram(begins, bins=4, range=(0, held_out))[0] / len(begins)
    # 400 draws of a quarter: four standard deviations; sentences are longer in some parts.
    assert (abs(share - 0.25) < 0.087).all(), share
    # No more is encoded than that takes.
    assert prose.tokens(0) < 1.5 * held_out


def test_stretches_begin_at_sentences_and_wrap_around(tmp_path):
    sentences = [f"Here sentence {number} says what it says." for number in range(7)]
    for number, few in enumerate((sentences[:3], sentences[3:])):
        (tmp_path / f"{number}.txt").write_text(" ".join(few))
    prose = Prose(PromptEncoder(GPT2), tmp_path)
    ends = np.cumsum([len(text_ids(GPT2, f" {sentence}")) for sentence in sentences])
    generator = np.random.default_rng(0)
    begins = {prose.draw(generator) for _ in range(200)}
    assert begins == {0, *ends[:-1].tolist()}
    for number, begin in enumerate(sorted(begins)):
        taken, starts = prose.units(begin).take(3 * ends[-1] + 5)
        turned = [*sentences[number:], *sentences[:number]]
        text = GPT2.decode(taken)
        assert text.startswith(" ".join(turned * 3)) and len(taken) == 3 * ends[-1] + 5
        assert GPT2.decode(taken[: starts[1]]) == turned[0] and len(starts) == 22


def test_text_without_end_is_not_read_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(haystacks, "DRAWN_FROM", 20_000)
    (tmp_path / "long.txt").write_text("It was a fine day. Nobody came. " * 12_000)
    prose, generator = Prose(PromptEncoder(GPT2), tmp_path), np.random.default_rng(0)
    begins = [prose.draw(generator) for _ in range(200)]
    assert 15_000 < max(begins) < 20_000 <= prose.tokens(0) < 30_000
    # Reading on changes nothing.
    prose.tokens(60_000)
    generator = np.random.default_rng(0)
    assert [prose.draw(generator) for _ in range(200)] == begins


@pytest.mark.parametrize("text", ["a line of code;\n" * 3000, "这是没有空格也没有句号的文字，" * 3000])
def test_text_without_sentences_has_stretches_too(tmp_path, text):
    (tmp_path / "hay.txt").write_text(text, encoding="utf-8")
    prose, generator = Prose(PromptEncoder(GPT2), tmp_path), np.random.default_rng(0)
    assert len({prose.draw(generator) for _ in range(50)}) > 5
    joined = " ".join(text.split())
    parts = list(sentences_of(joined))
    assert max(map(len, parts)) <= haystacks.LONGEST_SENTENCE and (" " if " " in joined else "").join(parts) == joined


def test_no_other_needle_has_the_key_that_is_asked_for(tasks, monkeypatch):
    monkeypatch.setattr(words, "pair", lambda generator: f"big-{['cat', 'dog', 'cow'][generator.integers(3)]}")
    text = GPT2.decode(tasks["niah_multikey_2"].make(0, 1500).tokens)
    asked = re.search(r"number for (\S+) mentioned", text)[1]
    keys = Counter(re.findall("numbers for (.*?) is:", text))
    assert keys.pop(asked) == 1 and len(keys) == 2 and sum(keys.values()) > 20


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multivalue"])
def test_depths_are_even(tasks, name):
    # Making many other needles takes long.
    length = 2000 if name == "niah_multikey_2" else 4000
    depths = [depth for sample in range(160) for depth in tasks[name].make(sample, length).depths]
    share = np.histogram(depths, bins=5, range=(0, 1))[0] / len(depths)
    # 160 draws of a fifth: three standard deviations.
    assert (abs(share - 0.2) < 0.095).all(), share
    if name == "niah_single_2":
        assert min(depths) == 0.0 and max(depths) == 1.0
    prompt = tasks[name].make(3, 4000)
    text = GPT2.decode(prompt.tokens)
    needle = text.index(prompt.references[0])
    hay = text.index(text.split("\n")[1]), text.rindex("\nWhat")
    assert abs((needle - hay[0]) / (hay[1] - hay[0]) - prompt.depths[0]) < 0.1


def test_needles_in_prose_stand_between_sentences(tasks):
    for sample in range(20):
        text = GPT2.decode(tasks["niah_single_2"].make(sample, 1200).tokens)
        before, after = re.fullmatch(r"(?s)(.*)One of the special magic numbers for .*? is: \d+\.(.*)", text).groups()
        assert re.search(r"([.!?][\"'”’)\]_]* |afterwards\.\n|\S )$", before)
        assert re.match(r" [\"'“‘(\[_]*[A-Z]|\nWhat is", after)


def test_variable_tracking(tasks):
    for sample in range(5):
        prompt = tasks["vt"].make(sample, 1500)
        text = GPT2.decode(prompt.tokens)
        example, question = text.split("\n\n\n\n")
        assert question.startswith(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        )
        names = prompt.references
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names) and len(set(names)) == 5
        lines = re.findall(r"VAR ([A-Z]+) = (VAR [A-Z]+|\d+) ", question)
        value = lines[0][1]
        assert re.fullmatch(r"\d{5}", value)
        assert lines == [(names[0], value), *((new, f"VAR {old}") for old, new in zip(names, names[1:], strict=False))]
        assert prompt.depths == sorted(prompt.depths)
        assert question.endswith(
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According "
            f"to the chain(s) of variable assignment in the text above, 5 variables are assgined the value {value}, "
            "they are:"
        )
        shown = re.findall(r"VAR ([A-Z]{3}) =", example)
        assert example.endswith(f"they are: {' '.join(shown)}") and len(shown) == 5
        assert example.count(FILLER) == 10


def listed_words(text):
    listed = text.rsplit("appear most often.\n", 1)[1].split("\nQuestion")[0]
    items = re.findall(r"(\d+)\. (.*?)(?= \d+\.| \d+$|$)", listed)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    return Counter(word for _, word in items)


@pytest.mark.parametrize("length, often, seldom", [(1500, 6, 1), (4095, 6, 1), (4096, 30, 3), (5000, 30, 3)])
def test_common_words(tasks, length, often, seldom):
    prompt = tasks["cwe"].make(1, length)
    text = GPT2.decode(prompt.tokens)
    counts = listed_words(text)
    common = prompt.references
    assert len(common) == 10 and [counts[word] for word in common] == [often] * 10
    others = Counter(count for word, count in counts.items() if word not in common)
    # The last words fill what is left, once each, and the last of all is cut.
    assert others[seldom] > 20 and sum(others.values()) - others[seldom] < 8
    assert max(others) == seldom
    assert set(common) <= set(words.vocabulary())
    assert text.count("What are the 10 most common words in the above list?") == 2
    answered = re.search(r"appear most often in the list are:(1\. .*)\n", text)[1]
    assert len(re.findall(r"\d+\. ", answered)) == 10
    assert prompt.depths is None


def test_a_list_longer_than_the_vocabulary_goes_on_with_pairs(monkeypatch):
    few = words.vocabulary()[100:160]
    monkeypatch.setattr(words, "vocabulary", lambda: few)
    prompt = tasks_of(GPT2, ["cwe"])["cwe"].make(0, 1500)
    counts = listed_words(GPT2.decode(prompt.tokens))
    assert set(few) <= set(counts) and max(count for word, count in counts.items() if word not in few) == 1
    assert sum(counts.values()) > 200


@pytest.mark.parametrize("length", [600, 1500, 20_000])
def test_frequent_words(tasks, length):
    prompt = tasks["fwe"].make(2, length)
    text = GPT2.decode(prompt.tokens)
    coded = text.split("coded words. ", 1)[1].split("\nQuestion")[0].split(" ")
    counts = Counter(coded)
    dots = counts.pop("...")
    answers = prompt.references
    ordered = [count for _, count in counts.most_common()]
    assert [counts[word] for word in answers] == ordered[:3] and ordered[2] > ordered[3]
    # All but the dots, which fill what is left, as one number of words makes them.
    fitting = [n for n in range(50, 3 * length) if zeta_counts(n, length // 50)[1:4].tolist() == ordered[:3]]
    assert any(
        [count for count in zeta_counts(n, length // 50).tolist() if count][1:] == ordered
        and dots >= zeta_counts(n, 1)[0]
        for n in fitting
    )
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts)


def test_zeta_frequencies():
    # 6 / pi^2 of all words are the first.
    assert zeta_counts(10_000, 4).tolist() == [6079, 1519, 675, 379]


@pytest.mark.parametrize("name", GENERATED)
def test_a_length_that_is_too_short_names_the_least(tasks, name):
    with pytest.raises(UsageError, match=f"--lengths 60: too short for {name}, .* at least (\\d+) tokens") as error:
        check_lengths(tasks[name], [5000, 60], 4)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    check_lengths(tasks[name], [least, 3000], 4)
    with pytest.raises(UsageError, match=f"at least {least} tokens"):
        check_lengths(tasks[name], [least - 1], 4)
    with pytest.raises(TooShort):
        [tasks[name].make(sample, least - 1) for sample in range(4)]


def test_long_lists_have_a_least_length_of_their_own():
    task = tasks_of(tokenizer_of("bytes"), ["cwe"])["cwe"]
    check_lengths(task, [4000], 3)
    with pytest.raises(UsageError, match=r"--lengths 5000: too short for cwe, .* at least (7\d\d\d) tokens"):
        check_lengths(task, [4000, 5000, 9000], 3)


def spaced_tokenizer():
    """A tokenizer of the kind that puts a space of its own in front of every text, as Llama 2's does."""
    alphabet = sorted(set("▁\n" + string.printable.strip()))
    words = ["▁One", "One", "▁The", "The", "▁is", "▁green", ".\n", "\n\n"]
    merges = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    tokens = dict.fromkeys([*alphabet, *(a + b for a, b in merges)])
    tokenizer = Tokenizer(
        models.BPE({token: id for id, token in enumerate(["<unk>", *tokens])}, merges, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "spaced"])
def test_pieces_are_encoded_as_in_the_whole_text(kind):
    tokenizer = spaced_tokenizer() if kind == "spaced" else tokenizer_of(kind)
    encoder = PromptEncoder(tokenizer)
    parts = ["The grass is green. One is.", " The grass.", " One is", "\n", "One.\n", "The end"]
    pieces = [encoder.head(parts[0]), *encoder.inner(parts[1:3]), encoder.text("\n", before="One")]
    pieces += [*encoder.inner([parts[4]], after="\n"), *encoder.inner([parts[5]], after="\n")]
    assert np.concatenate(pieces).tolist() == [*encoder.begin, *text_ids(tokenizer, "".join(parts))]
    head = encoder.head("It is.\n\n", before="The")
    assert [*head, *encoder.text("The end", after="\n")] == [*encoder.begin, *text_ids(tokenizer, "It is.\n\nThe end")]


def test_a_chat_begins_once():
    tokenizer = tokenizer_of("bytes")
    for chat in (True, False):
        for name, task in tasks_of(tokenizer, ["niah_multiquery", "vt", "cwe"], chat=chat).items():
            prompt = task.make(0, 8500)
            assert len(prompt.tokens) + task.new_tokens == 8500
            assert prompt.tokens[0] == BEGIN and (prompt.tokens == BEGIN).sum() == 1, name
            text = tokenizer.decode(prompt.tokens)
            assert ("[user] " in text) is chat
            assert not chat or re.search(r"[?.]\n(The special magic|Answer:) [^\n]*$", text)


def test_special_tokens_in_the_haystack_are_text(tmp_path):
    (tmp_path / "hay.txt").write_text("It says </s> and <s> here. " * 200)
    tokenizer = byte_tokenizer(adds="<s> $A </s>")
    for chat in (True, False):
        task = tasks_of(tokenizer, ["niah_single_2"], haystack=tmp_path, chat=chat)["niah_single_2"]
        assert (task.make(0, 3000).tokens < 2).sum() == 1


def test_a_tokenizer_without_chat_template():
    with pytest.raises(UsageError, match="--chat: this model's tokenizer has no chat template; leave"):
        PromptEncoder(GPT2, chat=True)


@pytest.mark.parametrize("template", ["fixed", "{{ messages[0]['content'] }} {{ messages[0]['content'] }}"])
def test_a_chat_template_that_changes_the_message(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(LandmarkError, match="does not give a user's message as it is"):
        PromptEncoder(tokenizer, chat=True)


def test_a_short_haystack_is_repeated(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("One fine day came.\nIt  went again. So be it")
    prose = Prose(PromptEncoder(GPT2), tmp_path / "short.txt")
    held = len(text_ids(GPT2, " One fine day came. It went again. So be it"))
    assert prose.tokens(1000) == held and not Prose(PromptEncoder(GPT2), tmp_path).is_read
    taken, starts = prose.units().take(3 * held)
    text = "One fine day came. It went again. So be it"
    assert GPT2.decode(taken) == f"{text} {text} {text}" and len(starts) == 9
    (tmp_path / "empty.txt").write_text(" \n")
    for asked in (Prose.units, lambda prose: prose.check_tokens(100)):
        with pytest.raises(LandmarkError, match="holds no text to hide anything in"):
            asked(Prose(PromptEncoder(GPT2), tmp_path / "empty.txt"))
    assert "repeated" not in capsys.readouterr().err
    with pytest.raises(LandmarkError, match=r"none\.txt"):
        Prose(PromptEncoder(GPT2), tmp_path / "none.txt")


def test_sentences():
    text = 'Mr. Bennet spoke. "Who?" she said.  Then 3.5 miles; Dr. Grant!  (He left.) _So._ it ended'
    assert list(sentences_of(text)) == [
        "Mr. Bennet spoke.",
        '"Who?" she said.',
        "Then 3.5 miles; Dr. Grant!",
        "(He left.)",
        "_So._ it ended",
    ]


# A sentence each, and what stands between two of them.
SCRIPTS = {
    "Chinese": ("我们在河边看见了一只船。", ""),
    "Japanese": ("「どこへ行くの？」", ""),
    "Russian": ("Баржа шла вниз по реке, и т. д.", " "),
    "French": ("«Ému?»", " "),
    "Spanish": ("¿Quién vive allí?", " "),
    "Arabic": ("هل رأيت السفينة؟", " "),
    "Hindi": ("वह नदी के पास गया।", " "),
    "Korean": ("우리는 강가에서 배를 보았다.", " "),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_sentences_of_other_scripts(script):
    sentence, between = SCRIPTS[script]
    assert list(sentences_of(between.join([sentence] * 4))) == [sentence] * 4


@pytest.mark.parametrize("script", ["Chinese", "Russian", "Arabic"])
def test_needles_lie_everywhere_in_text_of_other_scripts(tmp_path, script):
    sentence, between = SCRIPTS[script]
    (tmp_path / "hay.txt").write_text(between.join([sentence] * 2000), encoding="utf-8")
    task = tasks_of(GPT2, ["niah_single_2"], haystack=tmp_path)["niah_single_2"]
    depths = [depth for sample in range(40) for depth in task.make(sample, 2000).depths]
    assert np.histogram(depths, bins=4, range=(0, 1))[0].min() >= 3


def test_names():
    assert task_names(None, False) == list(GENERATED) and task_names([], True) == list(ALL)
    assert task_names(["vt", "niah_single_2"], False) == ["niah_single_2", "vt"]
    with pytest.raises(UsageError, match=r"--tasks niah_singel_2: .* did you mean niah_single_2\?"):
        task_names(["niah_singel_2"], False)
    with pytest.raises(UsageError, match="--qa FILE"):
        task_names(["qa"], False)


def test_words_without_their_package(monkeypatch):
    words._words.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "wonderwords", None)
    with pytest.raises(
        LandmarkError, match=r"wonderwords, which is not installed: pip install 'landmark-cli\[ruler\]'"
    ):
        words._words("noun")
    words._words.cache_clear()


def test_nothing_that_trains_knows_the_benchmark():
    """Text of the benchmark in training documents would make its figures mean nothing."""
    wording = (PACKAGE / "evaluation" / "ruler" / "wording.py").read_text(encoding="utf-8")
    texts = [node.value for node in ast.walk(ast.parse(wording)) if isinstance(node, ast.Constant)]
    phrases = [text.strip() for text in texts if isinstance(text, str) and len(text.split()) > 4]
    assert len(phrases) > 12
    places = [PACKAGE / "data", PACKAGE / "training", PACKAGE / "models", PACKAGE.parent / "recipes"]
    files = [file for place in places for file in place.rglob("*") if file.suffix in (".py", ".yaml", ".sh")]
    files += [PACKAGE / "commands" / f"{name}.py" for name in ("prepare", "train", "finetune")]
    assert len(files) > 40
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "evaluation.ruler" not in text and "wonderwords" not in text, file
        assert not [phrase for phrase in phrases if phrase in text], file


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {article}.{number} tells of the {article}th town and its {number}th river.",
                    "qas": [
                        {
                            "question": f"What does {article}.{number} tell of?",
                            "answers": [{"text": f"the {article}th town"}, {"text": f"{article}th town"}],
                            "is_impossible": False,
                        },
                        {"question": "What does nobody know?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(3)
            ]
        }
        for article in range(4)
    ]
}
HOTPOT = [
    {
        "question": f"Which is the river of {number}?",
        "answer": f"river {number}",
        "context": [[f"Title {number}.{part}", ["One. ", f"Two {number}."]] for part in range(3)],
    }
    for number in range(5)
]


@pytest.mark.parametrize("content, needed", [(SQUAD, 1), (HOTPOT, 3)], ids=["squad", "hotpot"])
@pytest.mark.parametrize("name", LENGTHS)
def test_questions_about_documents(tmp_path, content, needed, name):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(content))
    tokenizer = tokenizer_of(name)
    task = tasks_of(tokenizer, ["qa"], documents=file)["qa"]
    with pytest.raises(TooShort) as short:
        task.make(0, 90)
    assert len(task.make(0, short.value.least).tokens) + 32 == short.value.least
    for sample in range(4):
        asked = set()
        for length in (1300, 3000):
            prompt = task.make(sample, length)
            assert len(prompt.tokens) + 32 == length
            text = tokenizer.decode(prompt.tokens)
            documents = re.findall(r"Document (\d+):\n(.*?)(?=\n\n)", text, re.S)
            assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
            asked.add(question := re.search(r"\n\nQuestion: (.*) Answer:$", text)[1])
            about = next(one for one in task.questions if one.text == question)
            texts = [document for _, document in documents]
            assert prompt.references == about.answers and len(about.needed) == needed
            # Whole, once, whatever else is cut or comes again.
            assert [texts.count(task._documents[number]) for number in about.needed] == [1] * needed
        assert len(asked) == 1
    assert task.any_of and (task.repeated or name == "bytes")
    with pytest.raises(UsageError, match="--samples: the file of --qa has"):
        task.make(99, 1300)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ('{"a": 1}', "expected SQuAD's JSON"),
        ('[{"question": "who"}]', "expected SQuAD's JSON"),
        ('[1, "two"]', "expected SQuAD's JSON"),
        ("[]", "no question that has an answer"),
        ('{"data": []}', "no question that has an answer"),
        ('[{"question": "q", "answer": "a", "context": [["t", ["s"]]]}]', "no document besides"),
    ],
)
def test_files_that_hold_no_questions(tmp_path, content, message):
    file = tmp_path / "q.json"
    file.write_text(content)
    with pytest.raises(LandmarkError, match=message):
        tasks_of(GPT2, ["qa"], documents=file)["qa"].make(0, 1000)
