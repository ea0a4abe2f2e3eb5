"""Files from strangers: nothing we open runs code, and nothing reaches outside of its directory.

A canary is a file that the code would make, whoever says yes to whatever is asked on the way; a secret is one outside
of the directory that must neither be opened in place of the model's own nor end up in what is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import workplace
from tests.faults.bombs import CPU, FINETUNE, MAKE, RECOVER, RESUME, STUDY, TRAIN, generate, set_up
from tests.faults.forks import begin
from tests.faults.harness import SILENT, Broken, Kind, Trial, check_limits, check_refused

CANARY = "canary"
SECRET = "the secret that stands outside"
YES = b"y\n" * 100
Trap = Callable[[Path], None]


@dataclass(frozen=True)
class Stranger:
    """copies: of the workplace. trap: put into the trial's folder. refused: whether the command has to refuse by name;
    else it may also do its work without what the stranger wanted."""

    name: str
    copies: Sequence[str]
    trap: Trap
    arguments: Sequence[Any]
    names: Sequence[str]
    refused: bool = False
    quick: int = 1

    def run(self, trial: Trial) -> None:
        workplace.copy(trial.base, trial.work, *self.copies)
        set_up(self.trap, trial.work)
        ended = begin(self.arguments, trial.work, stdin=YES).wait()
        if (trial.work / CANARY).exists():
            raise Broken(SILENT, "the stranger's code ran")
        for path in (trial.work / "out").rglob("*"):
            if path.is_file() and SECRET.encode() in path.read_bytes():
                raise Broken(SILENT, f"{path.name} holds what stood outside of the directory")
        check_limits(ended)
        if ended.code != 0 or self.refused:
            check_refused(ended, *self.names, codes=(1, 2))


def touch(folder: Path) -> str:
    return f"open({str(folder / CANARY)!r}, 'w').close()"


def code_of_a_model(model: str, kind: str = "llama") -> Trap:
    """A model directory whose config.json names code beside it."""

    def trap(folder: Path) -> None:
        place = folder / model
        classes = {"AutoConfig": "stranger.StrangerConfig", "AutoModelForCausalLM": "stranger.Stranger"}
        _change(place / "config.json", auto_map=classes, model_type=kind)
        (place / "stranger.py").write_text(touch(folder) + "\nclass StrangerConfig: pass\nclass Stranger: pass\n")

    return trap


def code_of_a_tokenizer(model: str) -> Trap:
    """The same for a tokenizer."""

    def trap(folder: Path) -> None:
        place = folder / model
        names = ["stranger.Stranger", "stranger.Stranger"]
        _change(place / "tokenizer_config.json", auto_map={"AutoTokenizer": names}, tokenizer_class="Stranger")
        (place / "stranger.py").write_text(touch(folder) + "\nclass Stranger: pass\n")

    return trap


class Runs:
    """What a pickle makes by running code."""

    def __init__(self, folder: Path) -> None:
        self.code = touch(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def pickled(file: str, legacy: bool = False) -> Trap:
    """A file of torch.save, in the zip format or in the one before it, that runs code when it is unpickled."""

    def trap(folder: Path) -> None:
        import torch

        torch.save({"x": Runs(folder)}, folder / file, _use_new_zipfile_serialization=not legacy)

    return trap


def plain_pickle(file: str) -> Trap:
    def trap(folder: Path) -> None:
        import pickle

        (folder / file).write_bytes(pickle.dumps({"x": Runs(folder)}))

    return trap


def yaml_tag(file: str) -> Trap:
    def trap(folder: Path) -> None:
        code = json.dumps(touch(folder))
        for_both = "command: train\nstudy: perplexity\nroles: {a: b}\n"
        (folder / file).write_text(f"{for_both}rows: !!python/object/apply:builtins.exec [{code}]\n")

    return trap


def template(*ways: str) -> Trap:
    """A chat template that climbs from a value of jinja's to the system."""

    def trap(folder: Path) -> None:
        command = f"touch {folder / CANARY}"
        (folder / "llama" / "chat_template.jinja").write_text("".join(way.replace("COMMAND", command) for way in ways))

    return trap


def index_outside(model: str, file: str) -> Trap:
    """An index of shards that names a file outside, which is there and whole."""

    def trap(folder: Path) -> None:
        index = folder / model / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        first = next(iter(content["weight_map"].values()))
        os.replace(folder / model / first, folder / "outside.safetensors")
        name = file.replace("FOLDER", str(folder))
        content["weight_map"] = {k: name if v == first else v for k, v in content["weight_map"].items()}
        index.write_text(json.dumps(content))

    return trap


def manifest_outside(file: str) -> Trap:
    """A weight difference whose manifest names a file outside."""

    def trap(folder: Path) -> None:
        manifest = folder / "diff" / "landmark_diff.json"
        os.replace(folder / "diff" / "diff.safetensors", folder / "outside.safetensors")
        name = file.replace("FOLDER", str(folder))
        manifest.write_text(manifest.read_text().replace('"diff.safetensors"', json.dumps(name)))

    return trap


def link_outside(file: str) -> Trap:
    """A symbolic link to a file outside."""

    def trap(folder: Path) -> None:
        (folder / "secret").write_text(json.dumps({"x": SECRET}))
        (folder / file).unlink(missing_ok=True)
        os.symlink(folder / "secret", folder / file)

    return trap


def folder_outside(folder_name: str) -> Trap:
    """A symbolic link to a folder outside."""

    def trap(folder: Path) -> None:
        os.replace(folder / folder_name, folder / "elsewhere")
        for file in (folder / "elsewhere").iterdir():
            file.write_text(json.dumps({"x": SECRET}))
        os.symlink(folder / "elsewhere", folder / folder_name)

    return trap


def base_of_adapters(folder: Path) -> None:
    """Adapters whose base model is a directory with code."""
    code_of_a_model("llama", "stranger")(folder)
    _change(folder / "adapters" / "adapter_config.json", base_model_name_or_path="llama")


def tokenizer_of_tokens(folder: Path) -> None:
    """Token files that name a tokenizer with code."""
    code_of_a_tokenizer("llama")(folder)
    _change(folder / "tokens" / "train.json", tokenizer="llama")


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


PERPLEXITY = ["eval", "perplexity", "--data", "tokens", *CPU, "--model"]
PASSKEY = ["eval", "passkey", "--lengths", 500, "--prompts", 1, *CPU, "--model"]
WAYS = (
    "{{ cycler.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['exec']('COMMAND') }}",
    "{{ strftime_now.__globals__.__builtins__.__import__('os').system('COMMAND') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ lipsum.__globals__.os.system('COMMAND') }}",
    "{% set x = messages.append(1) %}{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
)
CHECKPOINT = "gpt/checkpoints/step-00000008"
STRANGERS = [
    *(
        Stranger(f"code of a model ({kind}), {' '.join(map(str, arguments[:2]))}", copies,
                 code_of_a_model("llama", kind), arguments, ["llama"], quick=quick)
        for kind, quick in (("llama", 0), ("stranger", 1))
        for copies, arguments in (
            (["llama"], generate("llama")),
            (["llama", "novels"], FINETUNE),
            (["llama", "tokens"], [*PERPLEXITY, "llama"]),
            (["llama"], [*PASSKEY, "llama"]),
        )
    ),
    *(
        Stranger(f"code of a tokenizer, {' '.join(map(str, arguments[:2]))}", copies,
                 code_of_a_tokenizer("llama"), arguments, ["llama"])
        for copies, arguments in (
            (["llama"], generate("llama")),
            (["llama", "novels"], FINETUNE),
            (["llama", "novels"],
             ["prepare", "text", "--source", "novels", "--tokenizer", "llama", "--output", "out"]),
        )
    ),
    Stranger("adapters over a model with code", ["adapters", "llama"], base_of_adapters, generate("adapters"),
             ["llama"]),
    Stranger("token files by a tokenizer with code", ["tokens", "llama"], tokenizer_of_tokens, TRAIN,
             ["llama", "tokens/train."]),
    *(
        Stranger(f"a pickle with code{' of old' if legacy else ''}: {file}", copies, pickled(file, legacy), arguments,
                 [Path(file).name, *names], refused=True, quick=0 if legacy else 1)
        for legacy in (False, True)
        for file, copies, arguments, names in (
            ("llama-bin/pytorch_model.bin", ["llama-bin"], generate("llama-bin"), ["llama-bin"]),
            ("authors-gpt/ckpt.pt", ["authors-gpt"], generate("authors-gpt"), ["authors-gpt"]),
            ("authors-raw/pytorch_model.bin", ["authors-raw", "authors-diff"],
             ["weight-diff", "recover", "--path-raw", "authors-raw", "--path-diff", "authors-diff", "--path-tuned",
              "out"], ["authors-raw"]),
            ("authors-diff/pytorch_model.bin", ["authors-raw", "authors-diff"],
             ["weight-diff", "recover", "--path-raw", "authors-raw", "--path-diff", "authors-diff", "--path-tuned",
              "out"], ["authors-diff"]),
        )
    ),
    *(
        Stranger(f"a plain pickle with code: {file}", copies, plain_pickle(file), arguments, [Path(file).name, *names],
                 refused=True, quick=0)
        for file, copies, arguments, names in (
            ("llama-bin/pytorch_model.bin", ["llama-bin"], generate("llama-bin"), ["llama-bin"]),
            ("authors-gpt/ckpt.pt", ["authors-gpt"], generate("authors-gpt"), ["authors-gpt"]),
        )
    ),
    *(
        # A checkpoint that is not as it was written is put aside, and the run goes on from the one before it.
        Stranger(f"a checkpoint with code: {file}, {how}", ["gpt", "tokens", "bytes"], trap(f"{CHECKPOINT}/{file}"),
                 RESUME, ["step-00000008"])
        for how, trap in (("saved by torch", pickled), ("a plain pickle", plain_pickle))
        for file in ("random_states_0.pkl", "optimizer.bin")
    ),
    Stranger("a recipe with a Python tag", ["tokens", "bytes"], yaml_tag("x.yaml"), [*TRAIN, "--recipe", "x.yaml"],
             ["x.yaml"], refused=True),
    Stranger("a study with a Python tag", ["gpt", "tokens"], yaml_tag("x.yaml"), ["eval", "study", "x.yaml"],
             ["x.yaml"], refused=True),
    *(
        Stranger(f"a chat template that climbs, way {number}", ["llama"], template(way), generate("llama", "--chat"),
                 ["llama", "--chat"], quick=number == 1)
        for number, way in enumerate(WAYS, 1)
    ),
    *(
        Stranger(f"an index that names {file}, {' '.join(map(str, arguments[:2]))}", copies,
                 index_outside(model, file), arguments, [model, file.rpartition("/")[2]], refused=True,
                 quick=file.startswith(".."))
        for file in ("../outside.safetensors", "FOLDER/outside.safetensors", "x/../../outside.safetensors")
        for model, copies, arguments in (
            ("llama-sharded", ["llama-sharded"], generate("llama-sharded")),
            ("raw", ["raw", "diff"], RECOVER),
            ("tuned", ["raw", "tuned"], MAKE),
        )
    ),
    *(
        Stranger(f"a manifest that names {file}", ["raw", "diff"], manifest_outside(file), RECOVER, ["diff"],
                 refused=True, quick=0)
        for file in ("../outside.safetensors", "FOLDER/outside.safetensors", "tuned/../../outside.safetensors")
    ),
    *(
        Stranger(f"a weight difference with a link: {file}", ["raw", "diff"], link_outside(file), RECOVER,
                 ["diff"], refused=True)
        for file in ("diff/tuned/tokenizer.json", "diff/tuned/config.json", "diff/config.json")
    ),
    Stranger("a weight difference with a folder that is a link", ["raw", "diff"], folder_outside("diff/tuned"),
             RECOVER, ["diff"], refused=True),
    Stranger("a weight difference with a link more than the manifest knows", ["raw", "diff"],
             link_outside("diff/tuned/chat_template.jinja"), RECOVER, ["diff"]),
    Stranger("a study whose model has code", ["llama", "gpt-baseline", "tokens", "study.yaml"],
             code_of_a_model("llama", "stranger"),
             [*(str(a).replace("landmark=gpt", "landmark=llama") for a in STUDY)], ["llama"]),
]  # fmt: skip

PROMISE = "files from strangers: no code of theirs runs, though yes is said to everything; nothing outside is opened"
KINDS = [Kind(f"strangers.{one.name}", PROMISE, 1, int(one.quick), one.run) for one in STRANGERS]
