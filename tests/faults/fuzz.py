"""Damaged files through every reader, by the function that its command calls.

What may come of one: the right result, or a LandmarkError that names the file. Everything else is a failure: another
exception, a crash, a wrong result, more time or memory than any input may cost.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import corpora, jobs, mutate, workplace
from tests.faults.harness import SILENT, UNCLEAR, Broken, Kind, digest
from tests.faults.mutate import Damage

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    copies: what it reads of the workplace. damages: the files that get damaged, as patterns, and how.
    read: reads in a folder, and returns what came of it. right: whether that, of a damaged file, is right; by default
    whatever comes is. names: what an error may name in place of the file.
    full: how many inputs. remake: makes what it reads in the folder, in place of copies.
    """

    name: str
    copies: Sequence[str]
    damages: Mapping[str, Damage]
    read: Read
    right: Callable[[Any, Input], bool] | None = None
    names: Sequence[str] | Callable[[Input], Sequence[str]] = ()
    full: int = 1600
    remake: Callable[[Path, Path], None] | None = None


@dataclass
class Input:
    """What a fork reads again and again, with another damage each time."""

    reader: Reader
    folder: Path
    base: Path
    whole: dict[Path, bytes] = field(default_factory=dict)
    undamaged: Any = None
    damaged: Path | None = None

    @property
    def bytes(self) -> bytes:
        return self.damaged.read_bytes()

    def restore(self) -> None:
        """Put everything back as it was."""
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path not in self.whole:
                path.unlink()
        for path, data in self.whole.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()


def make_input(reader: Reader, base: Path, work: Path) -> Input:
    import os

    os.chdir(work)
    if reader.remake is not None:
        reader.remake(base, work)
    workplace.copy(base, work, *reader.copies)
    made = Input(reader, work, base)
    made.whole = {path: path.read_bytes() for path in work.rglob("*") if path.is_file() and not path.is_symlink()}
    made.undamaged = reader.read(work)
    made.restore()
    return made


def read_damaged(made: Input, chance: random.Random) -> None:
    """One input: damage a file, read, judge, and put everything back."""
    from landmark_cli.errors import LandmarkError

    pattern = chance.choice(list(made.reader.damages))
    files = sorted(path for path in made.folder.glob(pattern) if path.is_file())
    made.damaged = chance.choice(files)
    original = made.whole[made.damaged]
    made.damaged.write_bytes(made.reader.damages[pattern](chance, original))
    try:
        result = made.reader.read(made.folder)
    except LandmarkError as error:
        names = made.reader.names(made) if callable(made.reader.names) else made.reader.names
        if not any(name in str(error) for name in (made.damaged.name, *names)):
            raise Broken(UNCLEAR, f"{made.damaged.name} damaged, and the error is: {str(error)[:300]}") from None
    else:
        if made.reader.right is not None and not made.reader.right(result, made):
            raise Broken(SILENT, f"{made.damaged.name} damaged, and the result is {str(result)[:200]}")
    finally:
        made.restore()


# The readers, each by what its command calls.


def open_token_file(folder: Path) -> Any:
    """All that training and evaluation use of a token file."""
    from landmark_cli.data.token_file import TokenFile

    file = TokenFile.open(folder / "tokens" / "train.bin")
    m = file.metadata
    return (m.eot_id, m.vocab_size, m.tokenizer_fingerprint), file.tokens.tolist()


def same(result: Any, made: Input) -> bool:
    return result == made.undamaged


def read_recipe(folder: Path) -> Any:
    from landmark_cli.commands.train import TrainOptions
    from landmark_cli.options import load_recipe

    return load_recipe(folder / "gpt" / "recipe.yaml", TrainOptions, "train")


def read_study(folder: Path) -> Any:
    from landmark_cli.evaluation.studies import load_study

    study = load_study(folder / "study.yaml")
    return study, study.columns, [row.reading() for row in study.rows]


def read_rows(folder: Path) -> Any:
    from landmark_cli.evaluation.studies import FinishedRows

    return FinishedRows(folder / "rows.jsonl").rows


def known_rows(result: Any, made: Input) -> bool:
    """Whether every row kept is one that was written: those that are lost are measured again."""
    return all(made.undamaged.get(key) == row for key, row in result.items())


def rewind_metrics(folder: Path) -> Any:
    from landmark_cli.training.metrics_file import MetricsFile

    MetricsFile(folder / "gpt" / "metrics.jsonl").rewind(6)
    return (folder / "gpt" / "metrics.jsonl").read_bytes().decode("utf-8")


def json_lines(result: Any, made: Input) -> bool:
    """Whether every line left is a JSON object of a step up to the sixth."""
    return all(json.loads(line)["step"] <= 6 for line in result.splitlines())


def generate(model: str, **options: Any) -> Read:
    """Open a model and let it go on a text, as `landmark generate` does."""

    def read(folder: Path) -> Any:
        from landmark_cli.commands.generate import GenerateOptions, run

        prompt = {} if "prompt_file" in options else {"prompt": "the 3 cats of 21 houses sat on the 4 mats." * 3}
        run(
            GenerateOptions(
                model=str(folder / model), device="cpu", temperature=0.0, max_new_tokens=2, **prompt, **options
            )
        )

    return read


def ask(folder: Path) -> Any:
    """Go on from what was read before, as `landmark generate --memory` does."""
    from landmark_cli.commands.generate import GenerateOptions, run

    options = {"device": "cpu", "temperature": 0.0, "max_new_tokens": 4, "prompt": "the 3 cats"}
    return run(GenerateOptions(model=folder / "gpt", memory=folder / "read.memory", **options)).tokens


def a_memory(base: Path, work: Path) -> None:
    from landmark_cli.commands.generate import GenerateOptions, run

    options = {"device": "cpu", "max_new_tokens": 0, "prompt": workplace.sentences(0, 9)}
    run(GenerateOptions(model=base / "gpt", save_memory=work / "read.memory", **options))


def damaged_memory(chance: random.Random, data: bytes) -> bytes:
    """Damaged, or whole and of another version."""
    if chance.random() < 0.9:
        return mutate.damaged_safetensors(chance, data)
    from landmark_cli.sealed import sealed_content

    length, content = int.from_bytes(data[:8], "little"), _memory_header(data)
    content.pop("checksum")
    content["about"]["version"] += chance.choice((-1, 1, 1000))
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["landmark"] = json.dumps(sealed_content(content))
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def as_it_was_read(result: Any, made: Input) -> bool:
    """Whether the answer is the right one, and of a memory of this version."""
    from landmark_cli.inference.memory_fit import VERSION

    return result == made.undamaged and _memory_header(made.bytes)["about"]["version"] == VERSION


def _memory_header(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["landmark"])


def prepare_with(tokenizer: str) -> Read:
    """Open a tokenizer and prepare a corpus with it."""

    def read(folder: Path) -> Any:
        from landmark_cli.data.tokenizers import load_tokenizer

        opened = load_tokenizer(str(folder / tokenizer))
        ids = [row.tolist() for row in opened.encode_documents(["the 3 cats", b"sat on \xe2\x82\xac", ""])]
        return ids, opened.fingerprint, opened.vocab_size, opened.landmark_id

    return read


def recover(raw: str, diff: str, **options: Any) -> Read:
    def read(folder: Path) -> Any:
        from landmark_cli.commands.weight_diff import RecoverOptions, run_recover

        run_recover(RecoverOptions(str(folder / raw), str(folder / diff), folder / "out", threads=1, **options))
        return digest(folder / "out")

    return read


def make_difference(folder: Path) -> Any:
    from landmark_cli.commands.weight_diff import MakeOptions, run_make

    run_make(MakeOptions(str(folder / "raw"), str(folder / "tuned"), folder / "out", threads=1))


def open_authors(folder: Path) -> Any:
    from landmark_cli.models.store import load

    load(folder / "authors-gpt", device="cpu")


def read_prompt(folder: Path) -> Any:
    from landmark_cli.commands.generate import GenerateOptions
    from landmark_cli.commands.generate import read_prompt as read

    return read(GenerateOptions(prompt_file=folder / "study.yaml"))


def the_text(result: Any, made: Input) -> bool:
    return result == made.bytes.decode("utf-8").removeprefix("\ufeff")


def go_on_preparing(folder: Path) -> Any:
    """Prepare again where an earlier run was interrupted."""
    from landmark_cli import cli

    with contextlib.suppress(SystemExit):
        cli.build_app(cli.COMMANDS)(args=[str(a) for a in jobs.PREPARE.arguments], standalone_mode=False)
    return json.loads(json.dumps(jobs.token_files(folder / jobs.OUTPUT)))


def as_if_uninterrupted(result: Any, made: Input) -> bool:
    return result == jobs.PREPARE.whole(made.base)


def interrupted_prepare(base: Path, work: Path) -> None:
    shutil.copytree(base / "interrupted" / jobs.OUTPUT, work / jobs.OUTPUT)
    workplace.link(base, work, "novels", "bytes")
    jobs.small_pieces()


def interrupt_prepare(base: Path) -> None:
    """Once, for the trials above: a prepare that was killed half-way."""
    import signal

    from tests.faults.moments import Changes

    jobs.PREPARE.setup(base)
    folder = base / "interrupted"
    folder.mkdir()
    workplace.link(base, folder, *jobs.PREPARE.reads)
    at = jobs.PREPARE.length(base).changes // 2
    ended = jobs.PREPARE.run(folder, before=partial(Changes(folder).watch, at, signal.SIGKILL))
    assert ended.killed and list((folder / jobs.OUTPUT).glob("*.partial")), ended


def load_checkpoint(folder: Path) -> Any:
    """Put a checkpoint into a run that is ready to go on: what its weights and its optimizer are then."""
    import torch

    loop = load_checkpoint.loop
    step = loop.checkpoints.load(loop.checkpoints.newest())
    state = {**loop.checkpoints._stored(), **_tensors(loop.optimizer.state_dict()["state"])}
    return step, {name: tensor.double().view(torch.int64).sum().item() for name, tensor in state.items()}


def _tensors(state: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    return {f"{key}.{name}": tensor for key, values in state.items() for name, tensor in values.items()}


def a_checkpoint(base: Path, work: Path) -> None:
    from tests.training.tiny import tiny_loop

    loop = tiny_loop(work / "run", steps=2, save_every=2)
    loop.run()
    load_checkpoint.loop = loop


def some_rows(base: Path, work: Path) -> None:
    """A study's finished rows, written by what writes them."""
    from landmark_cli.evaluation.studies import FinishedRows

    rows = FinishedRows(work / "rows.jsonl")
    for number in range(6):
        rows.add(rows.key({"number": number}), {"loss": 3.5 + number, "perplexity": 30.0, "chunks": [{"loss": 1.0}]})


JSON, BYTES, LINES = mutate.damaged_json, mutate.damaged, mutate.damaged_lines
TENSORS, ZIPPED, YAML = mutate.damaged_safetensors, mutate.damaged_zip, mutate.damaged_yaml
TOKENIZER = {"*/tokenizer.json": JSON, "*/tokenizer_config.json": JSON}

READERS = [
    Reader(
        "token metadata",
        ["tokens"],
        {"tokens/train.json": JSON},
        open_token_file,
        same,
        names=["tokens/train."],
        full=2500,
    ),
    Reader(
        "token files",
        ["tokens"],
        {"tokens/train.bin": BYTES},
        open_token_file,
        same,
        full=1500,
    ),
    Reader(
        "interrupted prepare", [], {"out/*": JSON}, go_on_preparing, as_if_uninterrupted, remake=interrupted_prepare
    ),
    Reader("recipes", ["gpt"], {"gpt/recipe.yaml": YAML}, read_recipe, full=2500),
    Reader("studies", ["study.yaml"], {"study.yaml": YAML}, read_study, full=2500),
    Reader("a study's rows", [], {"rows.jsonl": LINES}, read_rows, known_rows, remake=some_rows, full=2500),
    Reader("metrics.jsonl", ["gpt"], {"gpt/metrics.jsonl": LINES}, rewind_metrics, json_lines, full=2500),
    Reader(
        "checkpoints",
        [],
        {"run/checkpoints/*/*": JSON},
        load_checkpoint,
        same,
        names=["step-00000002"],
        remake=a_checkpoint,
        full=2000,
    ),
    Reader(
        "config.json of landmark models",
        ["gpt", "llama-landmark"],
        {"gpt/config.json": JSON},
        generate("gpt"),
        names=["gpt"],
    ),
    Reader(
        "config.json of decoders",
        ["llama-landmark"],
        {"llama-landmark/config.json": JSON, "llama-landmark/generation_config.json": JSON},
        generate("llama-landmark"),
        names=["llama-landmark"],
    ),
    Reader(
        "weights",
        ["gpt"],
        {"gpt/model.safetensors": TENSORS},
        generate("gpt"),
        names=["gpt"],
    ),
    Reader(
        "weights in shards",
        ["llama-sharded"],
        {"llama-sharded/*.index.json": JSON, "llama-sharded/*.safetensors": TENSORS},
        generate("llama-sharded"),
        names=["llama-sharded"],
    ),
    Reader("weights in .bin", ["llama-bin"], {"llama-bin/*.bin": ZIPPED}, generate("llama-bin"), names=["llama-bin"]),
    Reader("memories", ["gpt"], {"read.memory": damaged_memory}, ask, as_it_was_read, remake=a_memory, full=1000),
    Reader("tokenizers, preparing", ["llama"], {"llama/tokenizer*": JSON}, prepare_with("llama"), names=["llama"]),
    Reader(
        "tokenizers, generating", ["llama"], {"llama/tokenizer*": JSON}, generate("llama"), names=["llama"], full=1000
    ),
    Reader(
        "chat templates",
        ["llama"],
        {"llama/chat_template.jinja": mutate.damaged_template},
        generate("llama", chat=True),
        names=["llama", "--chat"],
    ),
    Reader(
        "adapters",
        ["adapters", "llama"],
        {"adapters/adapter_config.json": JSON, "adapters/config.json": JSON, "adapters/*.safetensors": TENSORS},
        generate("adapters"),
        names=["adapters"],
    ),
    Reader(
        "the authors' checkpoints",
        ["authors-gpt"],
        {"authors-gpt/summary.json": JSON, "authors-gpt/ckpt.pt": ZIPPED},
        open_authors,
    ),
    Reader(
        "weight differences",
        ["raw", "diff"],
        {
            "diff/landmark_diff.json": JSON,
            "diff/config.json": JSON,
            "diff/tuned/*": JSON,
            "diff/*.safetensors": TENSORS,
        },
        recover("raw", "diff"),
        same,
        names=["diff"],
        full=2000,
    ),
    Reader(
        "raw weights",
        ["raw", "diff"],
        {"raw/*.index.json": JSON, "raw/config.json": JSON, "raw/*.safetensors": TENSORS},
        recover("raw", "diff"),
        same,
        names=["raw"],
        full=1000,
    ),
    Reader(
        "the authors' differences",
        ["authors-raw", "authors-diff"],
        {
            "authors-diff/config.json": JSON,
            "authors-diff/*.bin": ZIPPED,
            "authors-diff/checksum_psum.txt": BYTES,
            "authors-raw/*.bin": ZIPPED,
        },
        recover("authors-raw", "authors-diff"),
        # The one sum that the authors give is of all files together.
        names=["authors-diff", "authors-raw", "checksum_psum.txt says"],
        full=1000,
    ),
    Reader(
        "tuned weights",
        ["raw", "tuned"],
        {"tuned/*.json": JSON, "tuned/*.safetensors": TENSORS},
        make_difference,
        names=["tuned"],
        full=1000,
    ),
    Reader("prompts", ["study.yaml"], {"study.yaml": BYTES}, read_prompt, the_text, full=1000),
    *(
        Reader(
            f"corpora, .{form}",
            [],
            {f"{form}/cats.{form}": damage},
            partial(corpora.prepare, form),
            corpora.right,
            names=corpora.names,
            remake=partial(corpora.inputs, form),
            full=full,
        )
        for form, damage, full in (
            ("txt", BYTES, 1000),
            ("tex", BYTES, 500),
            ("jsonl", LINES, 2000),
            ("jsonl.gz", mutate.damaged_inside_gzip, 1500),
            ("jsonl.zst", mutate.damaged_inside_zstandard, 1500),
            ("parquet", mutate.damaged_parquet, 1500),
        )
    ),
]

KINDS = [
    Kind(
        f"fuzz.{reader.name}",
        f"damaged files: {reader.name}",
        full=reader.full,
        quick=max(20, reader.full // 40),
        run=read_damaged,
        inputs=partial(make_input, reader),
        setup=interrupt_prepare if reader.remake is interrupted_prepare else None,
    )
    for reader in READERS
]
