"""The demo: facts are hidden where they are said to be, questions ask for them, and what is shipped is what was
trained."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import landmark_cli
from landmark_cli.data.tasks.facts import RELATIONS
from landmark_cli.data.tasks.questions import FRAMES
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.generation import Generation, encode_prompt
from landmark_cli.options import check_saved
from tests.modules import load_script
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "demo"
SHIPPED = ROOT / "landmark_cli" / "assets" / "demo"
TEXT = " ".join(f"Anne walked to the {n}th house of the village, and came back late." for n in range(300))


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patched:
        # Where a script lies, its own modules are found.
        patched.syspath_prepend(str(FOLDER))
        return {name: load_script(FOLDER / f"{name}.py") for name in ("hiding", "ask", "vocabulary", "ship")}


@pytest.fixture(scope="module")
def tokenizer(scripts):
    return scripts["vocabulary"].learned([TEXT], 300)


@pytest.fixture(scope="module")
def model_and_tokenizer(tokenizer, tmp_path_factory):
    """A random model of that vocabulary, as a run leaves it, opened."""
    directory = tmp_path_factory.mktemp("run")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<landmark>"]})
    (landmark,) = tokenizer.convert_tokens_to_ids(["<landmark>"])
    model = tiny_model(vocab_size=320, landmark_token_id=landmark, trained_length=400, eos_token_id=0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "recipe.yaml").write_text("command: train\n")
    return directory, *landmark_cli.load(directory, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_facts_stand_where_they_are_said_to(scripts, count):
    text, hidden = scripts["hiding"].hide_facts(TEXT, count, seed=4)
    assert len({one.sentence for one in hidden}) == count
    plain, done = [], 0
    for number, one in enumerate(hidden):
        assert text[one.place : one.place + len(one.sentence)] == one.sentence
        assert text[one.place - 2 : one.place] == ". "
        plain.append(text[done : one.place - 1])
        assert number - 0.1 < sum(map(len, plain)) / (0.95 * len(TEXT)) * count < number + 1.1
        done = one.place + len(one.sentence)
    assert "".join([*plain, text[done:]]) == TEXT
    assert hidden[-1].place < 0.96 * len(text)


def test_facts_are_a_function_of_the_seed(scripts):
    hide = scripts["hiding"].hide_facts
    assert hide(TEXT, 3, seed=1) == hide(TEXT, 3, seed=1) != hide(TEXT, 3, seed=2)


@pytest.mark.parametrize("begun", [True, False])
def test_questions_ask_for_what_is_hidden(scripts, begun):
    """Who or what a question is about stands in the fact's sentence, and so does the answer, which the question does
    not give away."""
    assert scripts["hiding"].FRAME in FRAMES
    for one in scripts["hiding"].hide_facts(TEXT, 60, seed=0, begun=begun)[1]:
        asked, lead = re.fullmatch(r"\n\nQ: (.*)\nA:(.*)", one.question).groups()
        subjects = {
            match[1]
            for relation in RELATIONS
            for ask in relation.asks
            if (match := re.fullmatch(re.escape(ask).replace(r"\{s\}", "(.+)"), asked, re.I))
        }
        assert any(subject.lower() in one.sentence.lower() for subject in subjects)
        assert one.value in one.sentence and one.value not in one.question
        assert bool(lead) == begun
        assert one.answered_by(f" {one.value}.") and one.answered_by(one.value.lower())
        assert not one.answered_by(f"{one.value}1.") and not one.answered_by("") and not one.answered_by("It is.")


def test_options(scripts, capsys):
    parsed = scripts["ask"].parsed
    options = parsed(["--model", "x"])
    assert (options.facts, options.seed, options.device, options.plain, options.text) == (3, 0, "cpu", False, None)
    options = parsed(["--model", "x", "--facts", "50", "--plain", "--brief", "--pages", "p", "--top-k-blocks", "8"])
    assert (options.facts, options.plain, options.brief, options.pages, options.top_k_blocks) == (
        (50, True, True, Path("p"), 8)
    )
    for wrong in ([], ["--model", "x", "--facts", "0"]):
        with pytest.raises(SystemExit):
            parsed(wrong)
    assert "--facts: there must be one at least" in capsys.readouterr().err


def test_shares_are_means_over_tokens_and_heads_of_the_last_layer(scripts):
    def entry(layer, head, block, share):
        return {"layer": layer, "head": head, "block": block, "share": share}

    first = [entry(1, 0, 2, 0.5), entry(1, 0, 5, 0.25), entry(1, 1, 2, 0.1), entry(1, 1, 9, 0.9), entry(0, 2, 3, 1.0)]
    second = [entry(1, 0, 5, 1.0), entry(1, 1, 2, 0.2), entry(0, 3, 2, 0.7)]
    generation = Generation("", [1, 2], 3, "length", [first, second])
    shares = scripts["ask"].block_shares(generation, 7)
    assert np.allclose(shares, [0, 0, 0.8 / 4, 0, 0, 1.25 / 4, 0])
    assert not scripts["ask"].block_shares(Generation("", [1], 3, "length", [[]]), 7).any()
    line = scripts["ask"].heat_map(shares, 14).plain
    drawn = line[-14:]
    assert drawn.strip(" ") and [i for i, c in enumerate(drawn) if c != " "] == [4, 10] and drawn[10] == "@"
    assert [scripts["ask"].column(block, 1000, 10) for block in (0, 99, 100, 999)] == [0, 0, 1, 9]


def test_the_vocabulary(tokenizer):
    assert len(tokenizer) in (300, 301) and tokenizer.eos_token_id == 0
    text = "Anne paid £12.50 in 1815; “naïve”, she said.\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    digits = [tokenizer.decode([i]) for i in tokenizer("the year 1815")["input_ids"]][-4:]
    assert digits == ["1", "8", "1", "5"]
    assert len(ids) < len(text.encode())


def test_the_vocabulary_has_the_words_of_facts(scripts):
    """Learned with them, so that facts take fewer tokens than by a text alone."""
    _, hidden = scripts["hiding"].hide_facts(TEXT, 30, seed=5)
    said = list(scripts["vocabulary"].said(100))
    assert said == list(scripts["vocabulary"].said(100)) and len(set(said)) == 100
    lengths = [
        sum(len(learned(one.sentence)["input_ids"]) for one in hidden)
        for learned in (scripts["vocabulary"].learned(texts, 900) for texts in ([TEXT], [TEXT, *said]))
    ]
    assert lengths[1] < 0.8 * lengths[0]


def test_every_question_goes_on_from_the_novel_alone(scripts, model_and_tokenizer, tmp_path):
    _, model, tokenizer = model_and_tokenizer
    text, hidden = scripts["hiding"].hide_facts(TEXT[:4000], 2, seed=0)
    ids = encode_prompt(tokenizer, text)
    reader = BlockReader(model, chunk=40)
    list(reader.read([torch.tensor(ids)], last_only=True))
    told = []
    for fact in (hidden[0], hidden[1], hidden[0]):
        answered, asked = scripts["ask"].answer(model, tokenizer, reader, ids, fact, block=3)
        assert reader.texts[0].tolist() == ids and asked.texts[0].tolist()[: len(ids)] == ids
        assert 0 < answered.shares.sum() <= 1 + 1e-6
        told.append((answered.with_memory.text, answered.without.text))
    assert told[0] == told[2]
    assert told[0] != told[1]


def test_the_whole_script(scripts, model_and_tokenizer, tmp_path, monkeypatch, capsys):
    directory = model_and_tokenizer[0]
    novel = tmp_path / "novel.txt"
    novel.write_text(TEXT[:4000], encoding="utf-8")
    arguments = ["--text", str(novel), "--chunk", "40", "--facts", "2", "--pages", str(tmp_path / "pages")]
    monkeypatch.setattr(sys, "argv", ["ask.py", "--model", str(directory), *arguments, "--json", str(tmp_path / "j")])
    scripts["ask"].main()
    out = capsys.readouterr().out
    _, hidden = scripts["hiding"].hide_facts(TEXT[:4000], 2, seed=0)
    for number, fact in enumerate(hidden, 1):
        assert fact.sentence in out and fact.question.strip() in out
        assert (tmp_path / f"pages/question-{number}.html").stat().st_size > 10_000
    assert re.search(r"answered right, of 2: with memory \d, without \d", out)
    for words in ("with memory  ", "without memory  ", "read, by place", "it stands here", "was read there"):
        assert out.count(f"  {words}") + out.count(f"text {words}") == 2, words
    assert max(len(line) for line in out.splitlines() if line.startswith(("  read", "  it"))) <= 79
    assert '"with memory": ' in (tmp_path / "j").read_text()


def test_what_is_shipped_is_what_was_trained(scripts, model_and_tokenizer, tmp_path, monkeypatch):
    directory, model, tokenizer = model_and_tokenizer
    size = scripts["ship"].ship(directory, tmp_path / "demo")
    assert size == sum(file.stat().st_size for file in (tmp_path / "demo").iterdir())
    weights = load_file(tmp_path / "demo" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    opened, its_own = landmark_cli.load(tmp_path / "demo", device="cpu", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor.bfloat16().float()), name
    assert its_own(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert opened.config.landmark_token_id == model.config.landmark_token_id
    monkeypatch.setattr(scripts["ship"], "LARGEST", size - 1)
    with pytest.raises(LandmarkError, match="may take .*: train a smaller one"):
        scripts["ship"].ship(directory, tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("script", "calls"),
    [
        ("run", "python recipes/demo/ask.py --model landmark_cli/assets/demo --seed 7 --device cpu"),
        ("train", "landmark train --recipe demo/tiny"),
    ],
)
def test_what_make_demo_and_make_demo_train_run(tmp_path, script, calls):
    """Programs that say how they were called stand in for the real ones."""
    for name in ("python", "landmark"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*"\necho "waits: $OMP_WAIT_POLICY"\n')
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SEED": "7"}
    environment.pop("OMP_WAIT_POLICY", None)
    command = ["bash", str(FOLDER / f"{script}.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"\n{calls}" in f"\n{done.stdout}"
    assert set(re.findall(r"waits: (.*)", done.stdout)) == {"passive"}


def test_the_shipped_model_finds_three_of_three_in_the_beginning_of_the_novel(scripts):
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= scripts["ship"].LARGEST
    check_saved(SHIPPED / "recipe.yaml", "ship it anew")
    model, tokenizer = landmark_cli.load(SHIPPED, device="cpu")
    text, facts = scripts["hiding"].hide_facts(scripts["hiding"].held_out_novel()[:20_000], 3, seed=0)
    reader, ids = BlockReader(model), encode_prompt(tokenizer, text)
    list(reader.read([torch.tensor(ids)], last_only=True))
    answers = [scripts["ask"].answer(model, tokenizer, reader, ids, fact, block=0)[0] for fact in facts]
    assert scripts["ask"].found(answers) == {"with memory": 3, "without memory": 0}


@pytest.mark.slow
def test_make_demo_finds_what_is_hidden_in_the_whole_novel(tmp_path):
    """What `make demo` runs, as it runs it, and within twice the minute of a processor that README says."""
    found = tmp_path / "found.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    command = ["bash", str(FOLDER / "run.sh"), "--json", str(found), "--pages", str(tmp_path / "pages")]
    before = os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(found.read_text())
    assert (told["facts"], told["with memory"], told["without memory"]) == (3, 3, 0)
    assert told["tokens"] > 120_000
    # The processors' time is that of the demo, whatever else runs beside it.
    after = os.times()
    processors = after.children_user + after.children_system - before.children_user - before.children_system
    assert processors < 2 * 60


@pytest.mark.slow
def test_the_model_is_made_from_nothing_but_the_package(tmp_path, monkeypatch):
    """make.sh at toy size; the novel is read by a model that knows nothing yet."""
    settings = {"DATA": "data", "RUN": "run", "OUTPUT": "shipped"}
    environment = os.environ | {name: str(tmp_path / value) for name, value in settings.items()}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment["CORPORA"] = "256-700:200 700-1950:100 2000-8000:40"
    environment |= {"PROCESSES": "2", "DEVICE": "cpu", "FACTS": "2", "SEEDS": "1", "OMP_NUM_THREADS": "1"}
    environment["SHAPE"] = "--n-layer 1 --n-head 1 --n-embd 32"
    toy = ["--steps", "2", "--batch-size", "2", "--no-compile", "--eval-every", "2", "--eval-windows", "1"]
    command = ["bash", str(FOLDER / "make.sh"), *toy, "--precision", "fp32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answered right, of 2: with memory ") == 2
    assert (tmp_path / "shipped/config.json").is_file() and (tmp_path / "run-3/plain-1.json").is_file()
    model, tokenizer = landmark_cli.load(tmp_path / "shipped", device="cpu")
    assert model.config.vocab_size == 5120 and tokenizer.convert_tokens_to_ids("<landmark>") == 5119
