"""A real pretrained decoder: it learns from itself for a few steps on the sample novels, is reopened, read, generated
with.

The model is made in data/smollm2 the first time (see smollm2.py).
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from landmark_cli import cli
from landmark_cli.data.token_file import TokenFile
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from tests.closeness import assert_close_norm
from tests.real.smollm2 import make_model

pytestmark = pytest.mark.real
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pretrained():
    directory = CHECKOUT / "data/smollm2"
    make_model(directory)
    return directory


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """The output of a short run that learns from the model as it was: windows of 252 text tokens and 4 landmarks, which
    choose and do no more."""
    return tune(pretrained, tmp_path_factory.mktemp("real") / "tuned")


@pytest.fixture(scope="module")
def grouped(pretrained, tmp_path_factory):
    """The same with the paper's softmax."""
    return tune(pretrained, tmp_path_factory.mktemp("real") / "grouped", "--softmax grouped")


def tune(pretrained: Path, output: Path, further: str = "") -> Path:
    command = f"finetune --model {pretrained} --data sample --output {output} --device cpu --sequence-length 256"
    how = "--steps 8 --batch-size 1 --accumulation 2 --lr 2e-4 --warmup 0.2 --log-every 1 --eval-every 0"
    run(f"{command} {how} {further}")
    return output


def run(command: str | list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(command.split() if isinstance(command, str) else command)
    assert exit.value.code == 0


def test_with_landmarks_off_it_is_the_untouched_model(pretrained, tmp_path):
    untouched = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, hidden = untouched(ids).logits, untouched.model(ids).last_hidden_state
    assert tokenizer.decode(expected[0, -1].argmax()) == " Rome"

    add_landmarks(untouched, tokenizer, landmark_freq=63, trained_length=2048)
    untouched.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        off = store.load(tmp_path, attention="sdpa", device="cpu")[0]
        # Within the first block there are no landmarks yet.
        on = store.load(tmp_path, device="cpu")[0]
        assert torch.equal(off.model(ids).last_hidden_state, hidden)
        # The head has more rows now, so its product may be added up in another order.
        for model in (off, on):
            logits = model(ids).logits[..., : expected.shape[-1]]
            assert_close_norm(logits, expected)


def recorded(output: Path, *names: str) -> list[list[float]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 8
    return [[record[name] for record in records] for name in names]


def test_a_few_steps_teach_it_what_landmarks_are(grouped):
    divergence, text = recorded(grouped, "divergence", "text_loss")
    assert sum(divergence[-2:]) / 2 < 0.6 * divergence[0], divergence
    assert sum(text[-2:]) / 2 < text[0] - 0.5, text


def test_landmarks_that_choose_begin_to_learn_which_blocks_matter_and_the_model_is_what_it_was(tuned, grouped):
    gate, divergence = recorded(tuned, "gate", "divergence")
    assert sum(gate[-2:]) < 0.8 * sum(gate[:2]), gate
    assert max(divergence) < 0.5 * recorded(grouped, "divergence")[0][0], divergence


FACTS = [
    ("One of the special magic numbers for Paris is: 4821.", "One of the special magic numbers for Paris is:", " 4821"),
    ("The pass key is 73915. Remember it.", "What is the pass key? The pass key is", " 73915"),
    ("The price of the red kettle is 57 pounds.", "The price of the red kettle is", " 57"),
]


@pytest.mark.parametrize("attention", [None, "sdpa"], ids=["with landmarks", "without"])
def test_what_it_could_find_in_a_text_it_still_finds(tuned, attention):
    model, tokenizer = store.load(tuned, attention=attention, device="cpu")
    model = model.float()
    novel = tokenizer.decode(TokenFile.open(tuned / "data/0-sample/validation.bin").tokens[:240].astype("int64"))
    for fact, question, answer in FACTS:
        asked = tokenizer(f"{novel[:200]}\n{fact}\n{novel[200:]}\n\n{question}", return_tensors="pt").input_ids
        wanted = tokenizer(answer, return_tensors="pt").input_ids
        text = torch.cat([asked, wanted], 1)
        with torch.no_grad():
            if attention is None:
                # In chunks of two blocks, each with all blocks before it.
                reader = BlockReader(model, top_k_blocks=text.shape[1] // 63, chunk=126)
                logits = torch.cat([chunk.logits for chunk in reader.read(list(text))], 1)
            else:
                logits = model(text).logits
        logits = logits[0, -wanted.shape[1] - 1 : -1]
        assert tokenizer.decode(logits.argmax(-1)) == answer


def test_it_opens_and_reads_rows_of_a_batch_as_it_reads_each(tuned):
    model, tokenizer = store.load(tuned, device="cpu")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "landmark"
    assert (model.config.landmark_freq, model.config.trained_length, model.config.vocab_size) == (63, 256, 49216)
    assert model.config.top_k_blocks == 2
    assert tokenizer.convert_tokens_to_ids("<landmark>") == model.config.landmark_token_id == 49152
    model = model.float()
    novel = torch.from_numpy(TokenFile.open(tuned / "data/0-sample/validation.bin").tokens[:200].astype("int64"))
    rows = [novel, novel[100:190]]
    together = [chunk.logits[:, -1] for chunk in BlockReader(model, top_k_blocks=1, chunk=126, batch=2).read(rows)]
    for i, row in enumerate(rows):
        alone = [chunk.logits[0, -1] for chunk in BlockReader(model, top_k_blocks=1, chunk=126).read([row])]
        for n, logits in enumerate(alone):
            assert_close_norm(together[n][i], logits)


def test_perplexity_and_text_by_the_command(tuned, tmp_path, capsys):
    corpus = tuned / "data/0-sample"
    run(
        f"eval perplexity --model {tuned} --data {corpus} --eval-length 378 --top-k-blocks 1 --sample-tokens 378 "
        f"--device cpu --dtype float32 --json {tmp_path / 'perplexity.json'}"
    )
    assert "perplexity" in (tmp_path / "perplexity.json").read_text()
    capsys.readouterr()
    generate = ["generate", "--model", str(tuned), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "8"]
    run([*generate, "--prompt", "It was a truth universally acknowledged, that a single man in"])
    text = capsys.readouterr().out
    assert text.strip() and "<landmark>" not in text
    run([*generate, "--chat", "--prompt", "What is the capital of France?"])
    assert capsys.readouterr().out.strip()
