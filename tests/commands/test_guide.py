"""The commands of docs/guide.md and of README's first steps, one after the other as they stand there, on models and
texts that take seconds."""

import re
import shlex

import pytest

from landmark_cli import cli
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.pages import ROOT, calls_in, lines_of, text_of

MODEL = "HuggingFaceTB/SmolLM2-135M"
# What makes each command short: options in place of those that the guide gives, or beside them.
SHORTER = {
    "prepare text": {},
    "prepare": {"--max-documents": 2},
    "train": {"--steps": 2, "--batch-size": 1, "--accumulation": 1, "--eval-every": 0},
    "plan": {},
    "plot": {},
    "finetune": {"--steps": 2, "--batch-size": 1, "--accumulation": 1, "--eval-every": 0, "--eval-ruler": "none"},
    "eval perplexity": {"--eval-length": 700, "--sample-tokens": 1400},
    "eval passkey": {"--lengths": 700, "--prompts": 1},
    "eval ruler": {"--lengths": 2000, "--samples": 1, "--tasks": "niah_single_1"},
    "generate": {"--max-new-tokens": 3},
}
DEVICES = {"train", "finetune", "eval perplexity", "eval passkey", "eval ruler", "generate"}


GUIDE, WITHOUT_GPU = text_of(ROOT / "docs" / "guide.md").split("## Without a GPU")
README = text_of(ROOT / "README.md").split("## From text to text")[1]


def commands(text: str) -> list[list[str]]:
    """The words of a text's commands; a server does not end."""
    calls = [shlex.split(call) for call in calls_in(lines_of(text))]
    return [words for words in calls if words[0] != "serve"]


def shorter(words: list[str]) -> list[str]:
    """A command as it is run here."""
    name = next(" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in SHORTER)
    changed = dict(SHORTER[name]) | ({"--device": "cpu"} if name in DEVICES else {})
    words = ["base" if word == MODEL else word for word in words]
    if "--max-new-tokens" in words:
        changed.pop("--max-new-tokens")
    for option, value in changed.items():
        if option in words:
            words[words.index(option) + 1] = str(value)
        else:
            words += [option, str(value)]
    return words


@pytest.fixture
def place(tmp_path, monkeypatch):
    """What the guide begins with: a folder of books, and a model that has 512 positions."""
    monkeypatch.chdir(tmp_path)
    tiny_decoder("llama", initializer_range=0.1).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    (tmp_path / "books").mkdir()
    for name in ("novel", "story", "tale"):
        text = " ".join(f"{name} {n}: the {n * 7 % 31} cats sat on {n % 5} mats." for n in range(120))
        (tmp_path / "books" / f"{name}.txt").write_text(text)
    return tmp_path


def test_the_guide_goes_through(place, fresh_accelerator, capsys):
    for words in commands(GUIDE):
        with pytest.raises(SystemExit) as exit:
            cli.main(shorter(words))
        out, err = capsys.readouterr()
        assert exit.value.code == 0, f"{shlex.join(words)}: {err}"
        if words[0] == "finetune" and "--dry-run" in words:
            assert "nothing is trained" in out and not (place / "runs").exists()
    assert (place / "runs/books/config.json").is_file() and (place / "novel.memory").is_file()
    assert (place / "reads.html").is_file() and (place / "studies/books").is_dir()
    assert (place / "course.png").is_file()


def test_the_guide_has_these_commands():
    names = [re.match(r"(?:eval |weight-diff )?[\w-]+(?: text)?", " ".join(words))[0] for words in commands(GUIDE)]
    assert len(names) > 10 and {*names, "prepare", "train"} == set(SHORTER)


@pytest.mark.parametrize("text", [README, pytest.param(WITHOUT_GPU, marks=pytest.mark.slow)], ids=["README", "guide"])
def test_the_first_steps_go_through(text, tmp_path, monkeypatch, fresh_accelerator, capsys):
    """From the shipped novels to a text, with what a CPU can do."""
    monkeypatch.chdir(tmp_path)
    first = commands(text)[:4]
    assert [words[0] for words in first] == ["prepare", "train", "eval", "generate"]
    for words in first:
        with pytest.raises(SystemExit) as exit:
            cli.main(shorter(words))
        out, err = capsys.readouterr()
        assert exit.value.code == 0, f"{shlex.join(words)}: {err}"
    assert out.strip()
