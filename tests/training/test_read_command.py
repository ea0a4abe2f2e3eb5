"""Runs whose windows are read chunk by chunk, or hold documents that do not see each other: train and finetune."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.commands.finetune import run as run_finetune
from landmark_cli.commands.train import TrainOptions, check
from landmark_cli.data import prepare
from landmark_cli.data.token_file import TokenFile
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import store
from landmark_cli.training import finetuning
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.command import SHORT, records, train
from tests.training.tiny import byte_tokenizer, write_corpus

CORPUS = Path("cats")
# Blocks of 7 text tokens and a landmark; windows of twelve chunks.
READ = {"read_chunk": 16, "top_k_blocks": 2, "sequence_length": 200, "batch_size": 1}
MODES = {
    "read": READ,
    "read and masked": READ | {"mask_documents": True},
    "read, whole documents": READ | {"mask_documents": True, "pack": "whole"},
    "masked": {"mask_documents": True},
    "whole documents": {"pack": "whole", "sequence_length": 200},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("read")
    write_corpus(root / "cats", byte_tokenizer(root / "bytes"), document=150)
    tiny_decoder("llama", initializer_range=0.1, max_position_embeddings=40).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    texts = [
        " ".join(f"the {n} cats sat on {n % 5} mats." for n in range(first, first + 20)) for first in range(0, 200, 20)
    ]
    (root / "cats.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return root


@pytest.fixture(autouse=True)
def in_the_place(place, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(place)


def finetune(output, **changes):
    short = {"landmark_freq": 7, "steps": 2, "accumulation": 2, "lr": 1e-2, "log_every": 1, "eval_every": 2}
    short |= {"eval_ruler": "none"}
    given = (
        short
        | {"device": "cpu", "teacher": "none", "model": "base", "data": ["cats.jsonl"], "validation_share": 0.4}
        | changes
    )
    run_finetune(FinetuneOptions(**given, output=output))
    return output


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if mode == "read and masked" else ()) for mode in MODES]
)
def test_train_resumes_to_the_bit(mode, tmp_path):
    options = MODES[mode] | {"save_every": 2}
    if "read_chunk" in options:
        # Windows of six chunks, which take half the time.
        options |= {"sequence_length": 104, "explore": 0.5}
    whole = train(CORPUS, tmp_path / "whole", **options)
    assert records(whole)[-1] < records(whole)[0] and len(records(whole, "validation_loss")) == 2
    half, saved = tmp_path / "half", "checkpoints/step-00000002"
    shutil.copytree(whole / saved, half / saved)
    train(CORPUS, half, resume=True, **options)
    assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (READ, READ | {"explore": 0.2}, "explore is 0.0 there and 0.2 here"),
        (READ, READ | {"read_chunk": 24}, "read_chunk is 16 there and 24 here"),
        (READ, READ | {"sequence_length": 208}, "sequence_length is 200 there and 208 here"),
        ({}, {"mask_documents": True}, "mask_documents is None there and True here"),
        ({"pack": "whole"}, {}, "pack is whole there and None here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_of_other_windows_is_not_gone_on_with(tmp_path, before, after, named):
    train(CORPUS, tmp_path / "run", steps=1, save_every=1, eval_every=0, **before)
    with pytest.raises(LandmarkError, match=named):
        train(CORPUS, tmp_path / "run", steps=1, resume=True, eval_every=0, **after)


def test_what_was_trained_reads_as_it_was_trained(tmp_path):
    output = train(CORPUS, tmp_path / "run", **READ)
    model, _ = store.load(output, device="cpu")
    assert (model.config.trained_length, model.config.top_k_blocks) == (3 * 8 + 16, 2)
    reader = BlockReader(model)
    assert reader.chunk == 14
    # The last validation loss of the run is a reader's over the same windows.
    file = TokenFile.open("cats/validation.bin")
    text, total, count = 175, 0.0, 0
    available = (len(file.tokens) - 1) // text
    for number in range(min(5, available)):
        first = number * available // min(5, available) * text
        tokens = torch.from_numpy(file.tokens[first : first + text + 1].astype("int64"))
        reader.reset()
        with torch.no_grad():
            logits = torch.cat([part.row(0) for part in reader.read([tokens[:-1]])])
        counted = tokens[:-1] != file.metadata.eot_id
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")[counted]
        total, count = total + losses.sum().item(), count + len(losses)
    assert records(output, "validation_loss")[-1] == pytest.approx(total / count, rel=1e-5)


def test_finetune_reads_windows_longer_than_the_models_positions(tmp_path):
    output = finetune(tmp_path / "run", **READ)
    config = AutoModelForCausalLM.from_pretrained(output).config
    assert (config.trained_length, config.top_k_blocks, config.max_position_embeddings) == (40, 2, 40)
    assert records(output)[-1] < records(output)[0]
    adapted = finetune(tmp_path / "adapted", lora_rank=2, **READ)
    assert (adapted / "adapter_config.json").exists() and records(adapted)[-1] < records(adapted)[0]
    masked = finetune(tmp_path / "masked", mask_documents=True, sequence_length=40)
    assert records(masked)[-1] < records(masked)[0]


def test_activations_are_computed_again_unless_told_otherwise(tmp_path, monkeypatch):
    from landmark_cli.training import setup

    asked = []
    monkeypatch.setattr(setup, "checkpoint_activations", lambda model, **settings: asked.append(settings))
    kept, again = {"keep_retrieved": True}, {"keep_retrieved": False}
    for number, (options, expected) in enumerate(
        [
            (READ, [kept]),
            (READ | {"keep_retrieved": False}, [again]),
            (READ | {"gradient_checkpointing": False}, []),
            ({}, []),
            ({"gradient_checkpointing": True}, [again]),
        ]
    ):
        asked.clear()
        train(CORPUS, tmp_path / f"run-{number}", steps=1, eval_every=0, **options)
        assert asked == expected


def test_a_dry_run_says_how_windows_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    train(CORPUS, tmp_path / "run", dry_run=True, **READ | {"explore": 0.25})
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "read in chunks of 16 tokens, each with 2 of the blocks before it, the last at random with probability" in shown
    )
    assert "400 in 2 windows of 200" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "documents one after another, cut where windows end"),
        ({"pack": "whole"}, r"documents whole, where a window is long enough; \d+% of the windows is text"),
        ({"mask_documents": True}, "cut where windows end; none sees another"),
    ],
)
def test_a_dry_run_says_how_documents_are_packed(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setenv("COLUMNS", "200")
    train(CORPUS, tmp_path / "run", dry_run=True, **SHORT | options)
    assert re.search(said, " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read_chunk": 20}, "--read-chunk 20 is no whole number of blocks .*: take 16 or 24"),
        ({"read_chunk": 7}, "--read-chunk 7 is no whole number of blocks .*: take 8$"),
        ({"sequence_length": 15}, "--sequence-length 15 holds no whole chunk of --read-chunk 16"),
        ({"read_chunk": None, "explore": 0.1}, "--explore .* give --read-chunk too"),
        ({"top_k_blocks": 0, "explore": 0.1}, "--explore draws the last of --top-k-blocks, and 0 leaves none"),
        ({"baseline": True}, "--read-chunk is for landmark attention"),
        ({"read_chunk": None, "baseline": True, "mask_documents": True}, "--mask-documents is for landmark attention"),
        ({"context_miss_token": True}, "leave out --read-chunk or --context-miss-token"),
        ({"position_jump": 3}, "leave out --read-chunk or --position-jump"),
        ({"group_dropout": 0.1}, "leave out --read-chunk or --group-dropout"),
        (
            {"read_chunk": None, "mask_documents": True, "position_jump": 3},
            "leave out --mask-documents or --position-j",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_what_cannot_be_is_refused_in_a_line(changes, message):
    with pytest.raises(UsageError, match=message) as refused:
        check(TrainOptions(**SHORT | READ | changes))
    assert "\n" not in str(refused.value)


def test_finetune_refuses_chunks_beyond_the_trained_positions(tmp_path):
    for changes, message in [
        ({"read_chunk": 24}, "take 48 positions, and base was trained with 40: take at most --read-chunk 16$"),
        ({"top_k_blocks": 4}, "take 56 positions, and base was trained with 40: take fewer --top-k-blocks$"),
    ]:
        with pytest.raises(LandmarkError, match=message) as refused:
            finetune(tmp_path / "run", **READ | changes)
        assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("command", ["train", "finetune", "finetune on token files"])
def test_one_document_has_nothing_to_mask(command, dry_run, tmp_path, monkeypatch):
    """Said before a model is opened or a text tokenized."""
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("a text was tokenized"))
    monkeypatch.setattr(finetuning, "open_with_landmarks", lambda *_, **__: pytest.fail("a model was opened"))
    with pytest.raises(LandmarkError, match="has no ends of documents") as refused:
        if command == "train":
            corpus = write_corpus(tmp_path / "one", byte_tokenizer(tmp_path / "bytes"), characters=1500)
            train(corpus, tmp_path / "run", mask_documents=True, dry_run=dry_run)
        else:
            (tmp_path / "one.txt").write_text("the cats sat on the mats. " * 40)
            data = str(tmp_path / "one.txt")
            if command == "finetune on token files":
                data = str(write_corpus(tmp_path / "one", byte_tokenizer(tmp_path / "bytes"), characters=1500))
            finetune(tmp_path / "run", data=[data], mask_documents=True, sequence_length=32, dry_run=dry_run)
    assert "\n" not in str(refused.value)
