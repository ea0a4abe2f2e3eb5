"""`--quiet`: of what commands say, results alone are left where nothing is wrong."""

import pytest

from tests.training.command import SMALL

GIVEN = ["--quiet", "--device=cpu"]
COMMANDS = {
    "prepare": ["prepare", "text", "--source=notes.txt", "--output=quiet-data", "--quiet"],
    "train": ["train", "--data=data/mine", "--output=quiet-run", "--steps=1", "--save-every=1", *GIVEN]
    + [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "device"],
    "eval perplexity": ["eval", "perplexity", "--data=data/mine", "--eval-length=40", "--json=-", *GIVEN],
    "eval passkey": ["eval", "passkey", "--lengths=200", "--prompts=1", *GIVEN],
    "generate": ["generate", "--prompt=It was", "--max-new-tokens=2", *GIVEN],
}


@pytest.mark.parametrize("words", COMMANDS)
def test_nothing_is_said_but_results(landmark, workplace, fresh_accelerator, words):
    (workplace / "notes.txt").write_text("It was the best of times. " * 20)
    done = landmark(*COMMANDS[words])
    assert done.code == 0
    assert done.err == ""
    assert done.out or words == "train"
