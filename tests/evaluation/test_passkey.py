"""Pass keys: every trial a function of the seed, whatever the batches; answers judged, tables and maps right."""

import io
import math
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from landmark_cli.data.gpt2_tokenizer import GPT2_LANDMARK_ID
from landmark_cli.data.passkey import QUESTION, TASK
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.evaluation import passkey
from landmark_cli.evaluation.heat_map import COLOURS, colour, draw_heat_map, terminal_heat_map
from landmark_cli.evaluation.passkey import Cell, PassKeyResult, Trial, evaluate_passkey, prompt_maker, wilson_interval
from landmark_cli.evaluation.ruler.encoding import PromptEncoder
from landmark_cli.evaluation.ruler.haystacks import Prose
from landmark_cli.inference.settings import ReadingSettings
from tests.awkward_tokenizers import BEGIN, byte_tokenizer
from tests.tiny import tiny_baseline, tiny_llama, tiny_model

GPT2 = load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    GPT2.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


class Finder(torch.nn.Module):
    """A model that finds the key where its window holds it: what the measuring must see as such."""

    def __init__(self, tokenizer):
        super().__init__()
        self.config = tiny_llama(max_position_embeddings=300, vocab_size=50304, eos_token_id=None).config
        self.tokenizer, self.device, self.name_or_path = tokenizer, torch.device("cpu"), "a finder"

    def forward(self, input_ids, logits_to_keep=None, use_cache=False):
        logits = torch.zeros(len(input_ids), len(logits_to_keep), self.config.vocab_size)
        for row, ids in enumerate(input_ids):
            text = self.tokenizer.decode(ids)
            found = re.search(r"The pass key is (\d+)\. Remember", text)
            answer = self.tokenizer.encode(f" {found.group(1) if found else 0}.")
            given = self.tokenizer.encode(text.rsplit("The pass key is", 1)[1])
            logits[row, :, answer[min(len(given), len(answer) - 1)]] = 1.0
        return SimpleNamespace(logits=logits)


def test_keys_are_found_where_the_window_holds_them(tokenizer, capsys):
    result = evaluate_passkey(Finder(tokenizer), tokenizer, [200, 280, 600], prompts=3, depths=3, batch_size=4)
    found = {length: [result.cell(length, depths).found for depths in result.depths] for length in result.lengths}
    # Three quarters of the window of 300 are seen of a longer prompt.
    assert found == {200: [3, 3, 3], 280: [3, 3, 3], 600: [0, 0, 3]}
    whole = evaluate_passkey(Finder(tokenizer), tokenizer, [600], prompts=3, depths=3, full_attention=True)
    assert whole.cell(600) == Cell(9, 9)
    assert {len(str(trial.key)) for trial in whole.trials} <= {3, 4, 5}
    # Counts: a share of 1 would read as one key.
    assert "found 9 of 9" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["landmark", "xl", "full attention"])
def test_batches_change_nothing(tokenizer, kind):
    ids = {"vocab_size": 50304, "eos_token_id": GPT2.eot_id}
    model = tiny_model(landmark_token_id=GPT2_LANDMARK_ID, **ids)
    if kind == "xl":
        model = tiny_baseline(memory_length=64, segment_length=64, **ids)
    elif kind == "full attention":
        model = tiny_llama(max_position_embeddings=512, **ids)
    settings = {
        "prompts": 2,
        "full_attention": kind == "full attention",
        "reading": ReadingSettings(chunk=64, top_k_blocks=100),
    }
    whole = evaluate_passkey(model, tokenizer, [140, 150], **settings)
    assert whole == evaluate_passkey(model, tokenizer, [150, 140], **settings, batch_size=1)
    assert [trial.length for trial in whole.trials] == [140] * 2 + [150] * 2
    other = evaluate_passkey(model, tokenizer, [140], **settings, seed=1)
    assert [t.key for t in other.trials] != [t.key for t in whole.trials[:2]]


@pytest.fixture
def asked(monkeypatch):
    """The prompts that are asked, none of which is answered."""
    prompts = []

    def ask(model, tokenizer, batch, reader):
        prompts.extend(batch)
        return [Trial(len(one.tokens), one.depth, one.key, "", one.begin) for one in batch]

    monkeypatch.setattr(passkey, "_ask", ask)
    monkeypatch.setattr(passkey.PromptReaders, "of", lambda *_: None)
    return prompts


def ask_in(prose, lengths, **settings):
    return evaluate_passkey(tiny_model(), GPT2.as_transformers(), lengths, prose=prose, batch_size=3, **settings).trials


def test_prompts_of_a_length_have_texts_of_their_own(asked):
    """Prompts that all end in the same words are one sample, however many they are."""
    prose = Prose(PromptEncoder(GPT2.as_transformers()))
    trials = ask_in(prose, [400, 900], prompts=12)
    assert [len(prompt.tokens) for prompt in asked] == [400] * 12 + [900] * 12
    for length in (400, 900):
        ends = [tuple(prompt.tokens[-60:].tolist()) for prompt in asked if len(prompt.tokens) == length]
        assert len(set(ends)) == 12
    assert [trial.begin for trial in trials] == [prompt.begin for prompt in asked]
    # The text around the key's line is the haystack's, from that token on.
    prompt = asked[-1]
    hay, starts = prose.units(prompt.begin).take(900)
    text, key = (
        GPT2.decode(prompt.tokens),
        f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n",
    )
    before, after = text.removeprefix(f"{TASK}\n").removesuffix(f"\n{QUESTION}").split(key)
    assert GPT2.decode(hay).startswith(before + after) and len(before + after) > 2000


def test_a_trial_depends_on_seed_length_and_number_alone(asked):
    encoder = PromptEncoder(GPT2.as_transformers())

    def prompts(lengths, prose=None, **settings):
        asked.clear()
        ask_in(prose or Prose(encoder), lengths, **settings)
        return [(prompt.key, prompt.depth, prompt.begin, prompt.tokens.tolist()) for prompt in asked]

    few = prompts([400], prompts=2)
    read = Prose(encoder)
    read.tokens(300_000)
    assert prompts([300, 400, 20_000], read, prompts=5)[5:7] == few
    assert not {begin for _, _, begin, _ in few} & {one[2] for one in prompts([400], prompts=2, seed=1)}
    # Keys and depths are those of every other haystack, and of the filler.
    asked.clear()
    evaluate_passkey(tiny_model(), GPT2.as_transformers(), [400], prompts=2)
    assert [(one.key, one.depth) for one in asked] == [one[:2] for one in few]
    assert {one.begin for one in asked} == {None}


def test_a_length_that_is_too_short_is_known_before_any_work(tokenizer, monkeypatch):
    monkeypatch.setattr(passkey, "_ask", lambda *arguments: pytest.fail("asked"))
    with pytest.raises(LandmarkError, match="of 30 tokens cannot be"):
        evaluate_passkey(tiny_model(), tokenizer, [400, 30])


@pytest.mark.parametrize(
    ("answer", "found"),
    [(" 4711", True), (" 4711. Remember", True), (" 47110", False), (" 471", False), ("no idea", False), ("", False)],
)
def test_answers(answer, found):
    assert Trial(400, 0.5, 4711, answer).found is found


def test_begin_of_text(tokenizer):
    assert prompt_maker(byte_tokenizer(adds="<s> $A </s>")).make(700, 1, 0.5).tokens[0] == BEGIN
    assert prompt_maker(tokenizer).make(200, 1, 0.5).tokens[0] != 50256


def test_wilson_interval():
    # The textbook's example: 8 of 10 gives 0.490 to 0.943.
    low, high = wilson_interval(8, 10)
    assert math.isclose(low, 0.4902, abs_tol=1e-4) and math.isclose(high, 0.9433, abs_tol=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0 and wilson_interval(5, 5)[1] == 1.0
    assert math.isclose(wilson_interval(3, 9)[0], 1 - wilson_interval(6, 9)[1])


def test_heat_map(tmp_path):
    trials = [Trial(512, 0.0, 1, " 1"), Trial(512, 0.05, 1, " 2"), Trial(512, 1.0, 1, " 1"), Trial(1024, 0.1, 1, "")]
    drawn = PassKeyResult(trials, None)
    assert [drawn.cell(512, depths).prompts for depths in drawn.depths] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert drawn.cell(512) == Cell(3, 2) and drawn.cell(1024, drawn.depths[1]) == Cell(1, 0)
    console = Console(width=80, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(terminal_heat_map(drawn))
    shown = console.export_text(styles=True)
    assert "0%-10%" in shown and " 50% " in shown and "48;2;254;224;139" in shown
    on_grid = PassKeyResult(trials[:1] + trials[2:3], [0.0, 0.5, 1.0])
    assert [on_grid.cell(512, depths).prompts for depths in on_grid.depths] == [1, 0, 1]
    draw_heat_map(on_grid, tmp_path / "new" / "map.png", "a title of $_{$ and [b]")
    assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (colour(0.0), colour(0.5), colour(1.0)) == COLOURS
