"""What the trials read: corpora in every form, tokenizers, models in every form, runs, weight differences.

All of it is made once, by the program itself where it makes such things, and then only read: a trial that changes a
file takes a copy.
"""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import shutil
from contextlib import redirect_stdout, suppress
from pathlib import Path

from tests.faults.forks import Fork, command

# Options of runs that take a second: the paper's model, and landmark attention for a pretrained decoder.
TRAIN = ["train", "--data", "tokens", "--device", "cpu", "--n-layer", 2, "--n-head", 2, "--n-embd", 16]
TRAIN += ["--sequence-length", 34, "--landmark-freq", 7, "--top-k-blocks", 2, "--lr", 1e-2, "--batch-size", 2]
TRAIN += ["--accumulation", 1, "--steps", 8, "--save-every", 2, "--log-every", 1, "--eval-every", 4]
TRAIN += ["--eval-windows", 4, "--dropout", 0.1]
FINETUNE = ["finetune", "--model", "llama", "--data", "novels", "--device", "cpu", "--landmark-freq", 7]
FINETUNE += ["--sequence-length", 32, "--steps", 6, "--batch-size", 2, "--accumulation", 1, "--lr", 1e-2]
FINETUNE += ["--save-every", 2, "--log-every", 1, "--eval-every", 3, "--eval-windows", 4]
ADAPTERS = ["--lora-rank", 2]
# eval study by two roles and several settings.
STUDY = ["eval", "study", "study.yaml", "--role", "landmark=gpt", "--role", "other=gpt-baseline", "--data", "tokens"]
STUDY += ["--device", "cpu", "--sample-tokens", 400]
MAKE = ["weight-diff", "make", "--path-raw", "raw", "--path-tuned", "tuned"]
RECOVER = ["weight-diff", "recover", "--path-raw", "raw", "--path-diff", "diff"]


def sentences(first: int, count: int) -> str:
    """Text that repeats itself with small changes."""
    return " ".join(f"the {n} cats of {n * 7 % 31} houses sat on {n % 5} mats." for n in range(first, first + count))


def link(base: Path, work: Path, *names: str) -> None:
    """Make parts of the workplace appear in a trial's folder, which only reads them."""
    for name in names or [entry.name for entry in base.iterdir()]:
        os.symlink(base / name, work / name)


def copy(base: Path, work: Path, *names: str) -> None:
    """Copies of parts of the workplace, to be changed."""
    for name in names:
        if (base / name).is_dir():
            shutil.copytree(base / name, work / name)
        else:
            shutil.copy(base / name, work / name)


def make(base: Path) -> None:
    """Make everything, in forks, so that this process stays as small and as single-threaded as it was."""
    base.mkdir(parents=True, exist_ok=True)
    for call in (make_texts, make_models):
        _succeed(Fork(lambda call=call: call(base), base, most_seconds=120).start().wait())
    warm_up(base)
    for arguments in (
        [*TRAIN, "--output", "gpt"],
        [*TRAIN, "--baseline", "--output", "gpt-baseline"],
        [*FINETUNE, "--output", "llama-landmark"],
        [*FINETUNE, *ADAPTERS, "--output", "adapters"],
        [*MAKE, "--path-diff", "diff"],
        [*RECOVER, "--path-tuned", "recovered"],
    ):
        _succeed(command(arguments, base, most_seconds=120))


def warm_up(base: Path) -> None:
    """Have this process do once what libraries do at their first use and keep: seconds that no fork then spends."""
    from landmark_cli import cli
    from landmark_cli.models.store import load

    with redirect_stdout(io.StringIO()), suppress(SystemExit):
        cli.main(["train", "--help"])
    for each in cli.COMMANDS:
        each.load()
    load(base / "llama", device="cpu")
    settle()


def settle() -> None:
    """Leave what there is out of garbage collection: a fork's would look at every object, and copy its page for it."""
    gc.collect()
    gc.freeze()


def _succeed(ended) -> None:
    if ended.code != 0:
        raise RuntimeError(f"the workplace could not be made: {ended.err}")


def make_texts(base: Path) -> None:
    """novels/: forty small files; corpora/: one in every form that is read; tokens/: token files."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import zstandard

    from tests.training.tiny import byte_tokenizer, write_corpus

    (base / "novels").mkdir()
    for number in range(40):
        ending = ("txt", "md", "tex")[number % 3]
        (base / "novels" / f"novel{number:02}.{ending}").write_text(sentences(number * 13, 12 + number % 9))
    corpora = base / "corpora"
    rows = [json.dumps({"text": sentences(number, 3), "title": f"t{number}"}) for number in range(60)]
    lines = ("\n".join(rows) + "\n").encode()
    for form, content in {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "jsonl.zst": zstandard.ZstdCompressor().compress(lines),
        "txt": sentences(5, 80).encode(),
        "tex": b"\\section{Cats}\n" + sentences(7, 80).encode(),
    }.items():
        folder = corpora / form
        folder.mkdir(parents=True)
        (folder / f"cats.{form}").write_bytes(content)
    (corpora / "parquet").mkdir()
    table = pa.table({"text": [sentences(number, 3) for number in range(60)], "title": ["t"] * 60})
    parquet.write_table(table, corpora / "parquet" / "cats.parquet", row_group_size=20)
    byte_tokenizer(base / "bytes")
    write_corpus(base / "tokens", base / "bytes", characters=3000)
    (base / "study.yaml").write_text(
        "study: perplexity\ntitle: What trials measure\n"
        "roles: {landmark: a model with landmarks, other: one without}\nrows:\n"
        + "".join(f"  - {{role: landmark, eval-length: {n}, top-k-blocks: {n % 2 + 1}}}\n" for n in (60, 80, 100))
        + "".join(f"  - {{role: other, eval-length: {n}}}\n" for n in (30, 60))
    )


def make_models(base: Path) -> None:
    """Decoders of transformers in every form of file, weights before and after a fine-tuning, the authors' forms."""
    import torch

    from tests.models.families import tiny_decoder, tiny_tokenizer
    from tests.weight_diff.weights import GOLDENS, golden, save

    tokenizer = tiny_tokenizer()
    model = tiny_decoder("llama", initializer_range=0.1)
    for name, settings in {"llama": {}, "llama-sharded": {"max_shard_size": "40KB"}}.items():
        model.save_pretrained(base / name, **settings)
    shutil.copytree(base / "llama", base / "llama-bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), base / "llama-bin" / "pytorch_model.bin")
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    for name in ("llama", "llama-sharded", "llama-bin"):
        tokenizer.save_pretrained(base / name)

    # Of several shards and sizes, so that a moment can fall between them.
    for name in ("raw", "tuned"):
        save(base / name, golden(name), shards=2)
        for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(GOLDENS / name / file, base / name / file)
    for name in ("raw", "diff"):
        shutil.copytree(GOLDENS / name, base / f"authors-{name}")
    _authors_checkpoint(base / "authors-gpt")


def _authors_checkpoint(folder: Path) -> None:
    import torch

    from tests import goldens

    spec, tensors = goldens.read("gpt_forward_0")
    folder.mkdir()
    torch.save({"model": goldens.part(tensors, "w."), "itr": 10, "optimizer": {}, "scheduler": {}}, folder / "ckpt.pt")
    args = {"model": "landmark", "n_layer": 3, "n_head": 4, "n_embd": 64, "sequence_length": 204, "mem_freq": 50}
    args |= {"landmark_id": spec["landmark_id"], "bias": False, "dropout": 0.0, "device": None}
    (folder / "summary.json").write_text(json.dumps({"args": args}))


def import_everything() -> None:
    """What commands import, before any fork: each fork then begins where the command's own work does."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import tiktoken  # noqa: F401
    import torch
    import transformers
    import yaml  # noqa: F401
    import zstandard  # noqa: F401

    import landmark_cli.commands.finetune
    import landmark_cli.data.prepare
    import landmark_cli.evaluation.perplexity
    import landmark_cli.evaluation.report
    import landmark_cli.inference.block_reader
    import landmark_cli.inference.generation
    import landmark_cli.models.lora
    import landmark_cli.training.loop
    import landmark_cli.weight_diff.recover  # noqa: F401

    torch.set_num_threads(1)
    for lazy in ("AutoModelForCausalLM", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, lazy)
    settle()
