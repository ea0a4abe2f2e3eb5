"""A model of a few thousand weights and batches that need no files."""

import os

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.training.loop import Loop, LoopSettings
from landmark_cli.training.optimizer import Schedule
from landmark_cli.training.setup import make_accelerator

VOCABULARY, LENGTH = 64, 20


class RandomBatches:
    """Rows drawn from (seed, step, row), some positions without a target, a different number in every row."""

    def __init__(self, global_batch, seed=0):
        self.global_batch, self.seed = global_batch, seed

    def batch(self, step, start, stop):
        ids, labels = [], []
        for row in range(start, stop):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step * 1009 + row)
            tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
            targets = (tokens[:-1] * 3 + 1) % VOCABULARY
            targets[: (5 * row + step) % (LENGTH - 2)] = -100
            ids.append(tokens[:-1])
            labels.append(targets)
        return {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}


class RandomWindows:
    """Rows for evaluation, others than a run's."""

    def __init__(self, count):
        self.count, self.rows = count, RandomBatches(count, seed=5)

    def __len__(self):
        return self.count

    def batch(self, start, stop):
        return self.rows.batch(0, start, min(stop, self.count))


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 16, "landmark_freq": 7}
    tokens = {"landmark_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 2, "trained_length": LENGTH}
    return GPTForCausalLM(GPTConfig(**(shape | tokens | changes)))


def tiny_loop(output, *, steps=6, batch_size=4, accumulation=2, model=None, identity=None, validation=(), **changes):
    """A loop over `batch_size * accumulation` rows a step, in each process, that logs every step; `changes` are
    LoopSettings' fields."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "output": output,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "sequence_length": LENGTH,
        "schedule": Schedule("one-cycle", 1e-2, steps, 0.2),
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "clip": 1.0,
        "precision": "fp32",
        "seed": 3,
        "log_every": 1,
        "evaluate_every": 0,
        "save_every": 0,
        "keep": 2,
    }
    return Loop(
        make_accelerator(precision="fp32", accumulation=accumulation, device="cpu", output=output),
        model if model is not None else tiny_model(),
        RandomBatches(batch_size * accumulation * processes),
        LoopSettings(**(settings | changes)),
        identity if identity is not None else {"n_layer": 2},
        validation=validation,
    )


def byte_tokenizer(directory):
    """A tokenizer directory whose 256 ids are bytes, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


def write_corpus(directory, tokenizer, characters=6000, document=1500):
    """train and validation token files of text that repeats itself with small changes; characters of a document."""
    tokenizer = load_tokenizer(str(tokenizer))
    for split, first in (("train", 0), ("validation", 1000)):
        text = " ".join(f"the {n} cats of {n * 7 % 31} houses sat on {n % 5} mats." for n in range(first, first + 400))
        with TokenFileWriter(directory / f"{split}.bin", tokenizer, source="made up") as writer:
            for start in range(0, characters, document):
                writer.add_document(np.array(tokenizer.encode(text[start : start + document])))
    return directory


def write_questions(directory, tokenizer, answers=True):
    """train and validation token files of questions, 40 each, whose answers are marked as such where `answers`."""
    tokenizer = load_tokenizer(str(tokenizer))
    for split, first in (("train", 0), ("validation", 100)):
        with TokenFileWriter(directory / f"{split}.bin", tokenizer, source="made up", answers=answers) as writer:
            for n in range(first, first + 40):
                asked, answer = f"the {n} cats of {n * 7 % 31} houses sat on {n % 5} mats; how many? ", f"{n} cats."
                ids = [np.array(tokenizer.encode(text)) for text in (asked, answer)]
                writer.append(ids[0])
                writer.append(ids[1], marks=np.ones(len(ids[1])) if answers else None)
                writer.end_document()
    return directory
