"""Small files that ask for much: time, memory, depth, an endless read. Refused by name, or read within bounds."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import workplace
from tests.faults.forks import Fork, command
from tests.faults.harness import Kind, Trial, check_limits, check_refused

Light = Callable[[Path], None]
CPU = ["--device", "cpu"]
GIGABYTES = 4 << 30
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@dataclass(frozen=True)
class Bomb:
    """copies: of the workplace. light: puts the bomb in place, in the trial's folder. names: what an error may name."""

    name: str
    copies: Sequence[str]
    light: Light
    arguments: Sequence[Any]
    names: Sequence[str]
    quick: int = 1

    def run(self, trial: Trial) -> None:
        workplace.copy(trial.base, trial.work, *self.copies)
        set_up(self.light, trial.work)
        ended = command(self.arguments, trial.work)
        check_limits(ended)
        if ended.code != 0:
            check_refused(ended, *self.names, codes=(1, 2))


def set_up(make: Light, folder: Path) -> None:
    """Do make(folder) in a fork, for what makes such files may leave threads and memory behind."""
    limits = {"most_seconds": 300, "most_bytes": 8 << 30}
    made = Fork(lambda: make(folder), folder, log=folder / "made", **limits).start().wait()
    if made.code != 0:
        raise RuntimeError(f"the file could not be made: {made.err}")


def prepare(form: str) -> list[Any]:
    return ["prepare", "text", "--source", f"bomb.{form}", "--tokenizer", "bytes", "--output", "out"]


def generate(model: str, *more: Any) -> list[Any]:
    return ["generate", "--model", model, "--prompt", "the 3 cats", "--max-new-tokens", 2, *CPU, *more]


TRAIN = [*workplace.TRAIN, "--output", "out"]
RESUME = [*workplace.TRAIN, "--output", "gpt", "--resume", "--steps", 10]
FINETUNE = [*workplace.FINETUNE, "--output", "out"]
STUDY = [*workplace.STUDY, "--output", "out"]
MAKE, RECOVER = [*workplace.MAKE, "--path-diff", "out"], [*workplace.RECOVER, "--path-tuned", "out"]


# Compressed files that unpack to gigabytes.


def zstandard_line(folder: Path) -> None:
    """122 kB that unpack to one line of 4 GB."""
    import zstandard

    frame = zstandard.ZstdCompressor().compress(b"a" * (256 << 20))
    (folder / "bomb.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor().compress(b'{"text": "') + frame * (GIGABYTES >> 28)
    )


def zstandard_window(folder: Path) -> None:
    """A frame of 100 bytes that asks for a window of 2 GB."""
    line = json.dumps({"text": "a" * 80}).encode() + b"\n"
    block = (len(line) << 3 | 1).to_bytes(3, "little")
    (folder / "bomb.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + block + line)


def gzip_line(folder: Path) -> None:
    """Four MB that unpack to one line of 4 GB."""
    member = gzip.compress(b"a" * (64 << 20), 1)
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "') + member * (GIGABYTES >> 26))


def parquet_value(folder: Path) -> None:
    """A row group of one value of 1.5 GB, 150 kB on the disk."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as parquet

    # Statistics hold the value twice more, and a value that was bytes first has been copied.
    size = 3 << 29
    parts = [None, *(pa.py_buffer(x) for x in (np.array([0, size], "<i8"), np.full(size, ord("a"), np.uint8)))]
    table = pa.table({"text": pa.Array.from_buffers(pa.large_binary(), 1, parts)})
    light = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(table, folder / "bomb.parquet", **light)


# Files that go on without end: sparse ones of 4 GB, pipes, devices.


def sparse(file: str) -> Light:
    def light(folder: Path) -> None:
        with open(folder / file, "ab") as opened:
            opened.truncate(GIGABYTES)

    return light


def endless(file: str) -> Light:
    def light(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.symlink("/dev/zero", folder / file)

    return light


def pipe(file: str) -> Light:
    def light(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return light


# Structures: aliases, depth, numbers.


def aliases(file: str) -> Light:
    """Nine aliases that stand for a thousand million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return text(file, "\n".join([*lines, "command: train", "study: perplexity", "rows: *a9", ""]))


def text(file: str, content: str | bytes) -> Light:
    def light(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return light


def changed(file: str, **values: Any) -> Light:
    """A JSON file with these values."""

    def light(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    return light


def expanded(file: str, key: str | None = None) -> Light:
    """A file of torch.save in which a tensor of one stored number claims to be 32 GB of it."""

    def light(folder: Path) -> None:
        import torch

        state = torch.load(folder / file, weights_only=True)
        tensors = state[key] if key else state
        tensors[next(iter(tensors))] = torch.zeros(1).expand(1 << 17, 1 << 16)
        torch.save(state, folder / file)

    return light


def header(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content


def many_tensors(count: int) -> bytes:
    entry = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return header(("{" + ",".join(entry % number for number in range(count)) + "}").encode())


HUGE_TENSOR = header(b'{"model.embed_tokens.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}')
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
DOUBLING = (
    "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)


def slow_expression(folder: Path) -> None:
    """A tokenizer that splits by an expression that tries every way to read a word."""
    file = folder / "llama" / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a|a|aa)*$|(a+)+b"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    (folder / "bomb.txt").write_text(("a" * 5000 + "!") * 40)


def far_token(folder: Path) -> None:
    """A tokenizer with a token whose id is four thousand million."""
    file = folder / "llama" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["<far>"] = 4_000_000_000
    file.write_text(json.dumps(content))


SAFETENSORS = ("gpt/model.safetensors", "gpt")
BOMBS = [
    Bomb("a .zst of one line of 4 GB", ["bytes"], zstandard_line, prepare("jsonl.zst"), ["bomb.jsonl.zst"]),
    Bomb("a .zst with a window of 2 GB", ["bytes"], zstandard_window, prepare("jsonl.zst"), ["bomb.jsonl.zst"]),
    Bomb("a .gz of one line of 4 GB", ["bytes"], gzip_line, prepare("jsonl.gz"), ["bomb.jsonl.gz"]),
    Bomb("a parquet value of 1.5 GB", ["bytes"], parquet_value, prepare("parquet"), ["bomb.parquet"], quick=0),
    Bomb("a .jsonl line of 4 GB", ["bytes"], sparse("bomb.jsonl"), prepare("jsonl"), ["bomb.jsonl"]),
    Bomb("YAML aliases in a recipe", ["tokens"], aliases("x.yaml"), [*TRAIN, "--recipe", "x.yaml"], ["x.yaml"]),
    Bomb("YAML aliases in a study", ["gpt", "tokens"], aliases("x.yaml"), ["eval", "study", "x.yaml"], ["x.yaml"]),
    Bomb(
        "an expanded tensor in a model's .bin",
        ["llama-bin"],
        expanded("llama-bin/pytorch_model.bin"),
        generate("llama-bin"),
        ["llama-bin"],
    ),
    Bomb(
        "an expanded tensor in raw weights",
        ["authors-raw", "authors-diff"],
        expanded("authors-raw/pytorch_model.bin"),
        ["weight-diff", "recover", "--path-raw", "authors-raw", "--path-diff", "authors-diff", "--path-tuned", "out"],
        ["authors-raw"],
    ),
    Bomb(
        "an expanded tensor in the authors' checkpoint",
        ["authors-gpt"],
        expanded("authors-gpt/ckpt.pt", "model"),
        generate("authors-gpt"),
        ["authors-gpt"],
    ),
    *(
        Bomb(f"config.json: {field} {value:,}", [model], changed(f"{model}/config.json", **{field: value}),
             generate(model), [model], quick=quick)
        for model, field, value, quick in (
            ("gpt", "n_embd", 16_000_000, 1), ("gpt", "n_layer", 10**9, 1), ("gpt", "vocab_size", 10**12, 0),
            ("gpt", "n_layer", 200_000, 0), ("gpt", "trained_length", 10**15, 1), ("gpt", "top_k_blocks", 10**15, 0),
            ("gpt", "landmark_freq", 10**15, 0), ("llama", "hidden_size", 16_000_000, 1),
            ("llama", "num_hidden_layers", 10**9, 1), ("llama", "intermediate_size", 10**12, 0),
            ("llama", "vocab_size", 3_000_000_000, 0), ("llama", "max_position_embeddings", 10**15, 0),
            ("llama-landmark", "num_attention_heads", 10**9, 0), ("llama-landmark", "head_dim", 10**9, 0),
        )
    ),
    Bomb(
        "summary.json: n_layer 1,000,000,000",
        ["authors-gpt"],
        text("authors-gpt/summary.json", json.dumps({"args": {"n_layer": 10**9, "n_head": 4, "n_embd": 64,
                                                              "sequence_length": 204, "mem_freq": 50}})),
        generate("authors-gpt"),
        ["authors-gpt", "summary.json"],
        quick=0,
    ),
    Bomb(
        "adapter_config.json: a rank of 1,000,000,000",
        ["adapters", "llama"],
        changed("adapters/adapter_config.json", r=10**9),
        generate("adapters"),
        ["adapters"],
        quick=0,
    ),
    Bomb("a far token, generating", ["llama"], far_token, generate("llama"), ["llama"]),
    Bomb("a far token, finetuning", ["llama", "novels"], far_token, FINETUNE, ["llama"], quick=0),
    Bomb(
        "a slow expression in a tokenizer",
        ["llama"],
        slow_expression,
        ["prepare", "text", "--source", "bomb.txt", "--tokenizer", "llama", "--output", "out"],
        ["llama", "bomb.txt"],
    ),
    *(
        Bomb(f"a chat template with {what}", ["llama"], text("llama/chat_template.jinja", template),
             generate("llama", "--chat"), ["llama", "--chat"], quick=quick)
        for what, template, quick in (
            ("endless loops", LOOPS, 1), ("a text that doubles", DOUBLING, 1),
            ("a number of a thousand million digits", "{{ 9 ** 999999999 }}", 0),
            ("a width of a thousand million", "{{ '%999999999d' % 1 }}", 0),
            ("itself in itself", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", 0),
        )
    ),
    *(
        Bomb(f"safetensors: {what}", ["gpt"], text("gpt/model.safetensors", content), generate("gpt"), ["gpt"], quick=0)
        for what, content in (
            ("a header of 2^63 bytes", header(b"{}", 2**63)),
            ("a header of 90 MB", header(b"{}" + b" " * (90 << 20))),
            ("a tensor of 4 TB", HUGE_TENSOR),
            ("a million tensors", many_tensors(1_000_000)),
            ("depth", header(DEEP)),
        )
    ),
    *(
        Bomb(f"raw weights, safetensors: {what}", ["raw", "diff"],
             text("raw/model-00001-of-00002.safetensors", content), RECOVER, ["raw"], quick=0)
        for what, content in (
            ("a header of 90 MB", header(b"{}" + b" " * (90 << 20))),
            ("a million tensors", many_tensors(1_000_000)),
            ("depth", header(DEEP)),
        )
    ),
    *(
        Bomb(f"{what}: {file}", copies, light(file), arguments, [Path(file).name, *names], quick=0)
        for file, copies, arguments, names in (
            ("tokens/train.json", ["tokens", "bytes"], TRAIN, ["tokens/train."]),
            ("gpt/config.json", ["gpt"], generate("gpt"), ["gpt"]),
            ("gpt/tokenizer.json", ["gpt"], generate("gpt"), ["gpt"]),
            ("gpt/tokenizer_config.json", ["gpt"], generate("gpt"), ["gpt"]),
            ("gpt/model.safetensors", ["gpt"], generate("gpt"), ["gpt"]),
            ("gpt/metrics.jsonl", ["gpt", "tokens", "bytes"], RESUME, ["gpt"]),
            ("gpt/checkpoints/step-00000008/training.json", ["gpt", "tokens", "bytes"], RESUME, ["step-00000008"]),
            ("llama/generation_config.json", ["llama"], generate("llama"), ["llama"]),
            ("llama/chat_template.jinja", ["llama"], generate("llama", "--chat"), ["llama"]),
            ("llama-sharded/model.safetensors.index.json", ["llama-sharded"], generate("llama-sharded"),
             ["llama-sharded"]),
            ("llama-bin/pytorch_model.bin", ["llama-bin"], generate("llama-bin"), ["llama-bin"]),
            ("diff/landmark_diff.json", ["raw", "diff"], RECOVER, ["diff"]),
            ("diff/tuned/config.json", ["raw", "diff"], RECOVER, ["diff"]),
            ("raw/config.json", ["raw", "diff"], RECOVER, ["raw"]),
            ("raw/model.safetensors.index.json", ["raw", "diff"], RECOVER, ["raw"]),
            ("tuned/tokenizer.json", ["raw", "tuned"], MAKE, ["tuned"]),
            ("adapters/adapter_config.json", ["adapters", "llama"], generate("adapters"), ["adapters"]),
            ("authors-gpt/summary.json", ["authors-gpt"], generate("authors-gpt"), ["authors-gpt"]),
            ("recipe.yaml", ["tokens", "bytes"], [*TRAIN, "--recipe", "recipe.yaml"], []),
            ("study.yaml", ["gpt", "tokens"], ["eval", "study", "study.yaml"], []),
        )
        for what, light in (
            ("100,000 deep", lambda file: text(file, DEEP)),
            ("4 GB", sparse),
            ("without an end", endless),
            ("a pipe", pipe),
        )
    ),
]  # fmt: skip

PROMISE = "small files that ask for much (unpacking, depth, size, loops, pipes): refused by name, or read within bounds"
KINDS = [Kind(f"bombs.{bomb.name}", PROMISE, 1, bomb.quick, bomb.run) for bomb in BOMBS]
