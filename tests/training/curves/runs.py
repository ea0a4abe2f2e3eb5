"""Short seeded runs whose loss curves are kept beside this file, so that a change of the code cannot change training
unseen: test_curves.py runs them again. Where training is meant to change, `python -m tests.training.curves.runs` writes
the curves anew, and the commit says what changed them.

Dropout is left out: unlike all else here, what it draws differs between kinds of processors.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from landmark_cli.commands import finetune, train
from landmark_cli.data.corpora import open_corpus
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from tests.models.families import GROUPED, tiny_tokenizer

FOLDER = Path(__file__).parent
STEPS = 50
Curve = dict[str, list[float]]

RUN = {
    "steps": STEPS,
    "log_every": 1,
    "eval_every": STEPS // 2,
    "eval_windows": 4,
    "save_every": 0,
    "seed": 0,
    "precision": "fp32",
    "device": "cpu",
}
# The model of recipes/demo/tiny.yaml at half of its width and length. Its vocabulary is bytes: nearly all the time
# would go into the head otherwise.
TRAIN = RUN | {
    "sequence_length": 128,
    "landmark_freq": 15,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "batch_size": 2,
    "accumulation": 1,
    "lr": 4e-3,
    "warmup": 0.05,
    "final_lr": 0.05,
    "weight_decay": 0.1,
}
RECURRENT = {"baseline": True, "memory_length": 32, "segment_length": 32}
VARIANTS = {"context_miss_token": True, "controlled_landmarks": 0.5, "position_jump": 40, "group_dropout": 0.2}
FINETUNE = RUN | {
    "model": "base",
    "teacher": "none",
    "data": ["data"],
    "sequence_length": 128,
    "landmark_freq": 15,
    "batch_size": 1,
    "accumulation": 2,
    "lr": 2e-3,
}


def tiny_llama(directory: Path) -> None:
    """A random Llama and its tokenizer, as a pretrained model's directory. Its weights are drawn by name, so they do
    not depend on the order in which a version of transformers makes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**GROUPED | {"vocab_size": len(tokenizer)}))
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        uniform = torch.rand(parameter.shape, generator=generator) - 0.5
        parameter.data = uniform * 0.35 if parameter.dim() > 1 else 1 + uniform * 0.2
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_place() -> None:
    """What all runs read, in the working directory: the Llama in base/, two sample novels' beginnings in data/."""
    tiny_llama(Path("base"))
    tokenizer = load_tokenizer("base")
    novels = dict(reversed(list(open_corpus("sample").documents())))
    for split, size in (("train", 200_000), ("validation", 50_000)):
        text = b"".join(novels[split].pieces(1 << 20))[:size].decode(errors="ignore")
        with TokenFileWriter(Path("data") / f"{split}.bin", tokenizer, source="the sample") as writer:
            writer.add_document(np.array(tokenizer.encode(text)))


# Name of the curve -> the command, its options, and what the run changes of those above.
RUNS: dict[str, tuple[Callable[[Any], None], type, dict[str, Any]]] = {
    "landmark": (train.run, train.TrainOptions, TRAIN | {"data": [Path("data")]}),
    "variants": (train.run, train.TrainOptions, TRAIN | {"data": [Path("data")]} | VARIANTS),
    "transformer-xl": (train.run, train.TrainOptions, TRAIN | {"data": [Path("data")]} | RECURRENT),
    "llama": (finetune.run, finetune.FinetuneOptions, FINETUNE),
}


def run(name: str, output: Path, **changes: Any) -> Curve:
    """Carry out the run of this name where make_place was called -> loss and gradient norm of every step, and the
    validation losses. changes: other options than the kept curve's."""
    work, options_class, options = RUNS[name]
    work(options_class(**(options | changes | {"output": output})))
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        key: [float(f"{record[key]:.8g}") for record in records if key in record]
        for key in ("loss", "gradient_norm", "validation_loss")
    }


def kept(name: str) -> Curve:
    """The curve that is checked in."""
    return json.loads((FOLDER / f"{name}.json").read_text())


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    make_place()
    for name in sys.argv[1:] or RUNS:
        (FOLDER / f"{name}.json").write_text(json.dumps(run(name, Path(name))).replace("], ", "],\n ") + "\n")
