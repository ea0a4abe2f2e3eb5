"""Open what a user has: our model directories, transformers' directories and hub ids, the authors' checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.console import info
from landmark_cli.data.checks import check_landmark_token
from landmark_cli.data.pretrained_tokenizers import open_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading
from landmark_cli.file_reading import read_record
from landmark_cli.model_files import check_directory
from landmark_cli.torch_files import load_weights

from .device import fast_dtype, find_device
from .generation_config import silence
from .gpt import GPTConfig, GPTForCausalLM
from .import_authors import convert_state
from .lora import is_adapter, open_adapted
from .pretrained import CHECKPOINT, open_pretrained, shape_of
from .quantization import Quantization, check_quantization, quantize
from .size import MOST_MODULES

FINISHED_WEIGHTS = ("model*.safetensors", "adapter_model*")
# What directories are called while a run or `weight-diff` writes them.
UNFINISHED = (".partial", ".unfinished", ".replaced")


def load(
    path: str | Path,
    *,
    attention: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    quantization: Quantization = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model and its tokenizer, ready for inference.

    path: a model or adapter directory, a hub id, or a checkpoint directory of the authors' lm_benchmark (ckpt.pt and
    summary.json).
    attention: transformers' `attn_implementation`; by default the one the model was saved with. dtype: of the weights,
    by default as stored, or float32 where a CPU is slow with that (see `fast_dtype`). trust_remote_code: whether Python
    code that comes with the model, or with the one under adapters, may run. device: as `find_device` takes it; by
    default a GPU where there is one. quantization: "int8" or "int4" to hold the weights of linear layers in 8 or 4 bits
    (see quantization.py), on a GPU with the extra `quantization`.

    Raises LandmarkError naming what is missing or does not fit, UsageError where there is no such device.

    >>> model, tokenizer = landmark_cli.load("runs/landmark", device="cpu")
    >>> model.config.landmark_freq
    4
    """
    device = find_device(device)
    check_quantization(quantization, dtype, device)
    directory = Path(path)
    how = {"attention": attention, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if (directory / "ckpt.pt").is_file():
        model, tokenizer = _load_authors(directory, attention, dtype)
    elif is_adapter(directory):
        model, tokenizer = open_adapted(directory, **how)
    else:
        model, tokenizer = open_pretrained(path, **how)
    silence(model, tokenizer)
    if dtype == "auto" and not getattr(model, "is_quantized", False):
        fast = fast_dtype(model.dtype, device)
        if fast != model.dtype:
            stored, fast = (str(x).removeprefix("torch.") for x in (model.dtype, fast))
            info(f"weights in {stored} become {fast}, in which this CPU is faster (--dtype {stored} keeps them)")
            model = model.to(getattr(torch, fast))
    if quantization != "none":
        quantize(model.eval(), quantization, device)
    return model.to(device).eval(), tokenizer


def outline(path: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load` opens, for what can be told of a model without its weights: on the meta device where it is a
    directory of transformers' form or a hub id. Arguments and errors are those of `load`."""
    if _takes_weights(path):
        return load(path, trust_remote_code=trust_remote_code, device="cpu")
    model = outline_alone(path, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
    if getattr(model.config, "landmark_freq", None) is not None:
        check_landmark_token(model.config, tokenizer, str(path))
    return model, tokenizer


def outline_alone(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """As `outline`, of a model whose tokenizer nobody needs."""
    if _takes_weights(path):
        return load(path, trust_remote_code=trust_remote_code, device="cpu")[0]
    return shape_of(path, trust_remote_code=trust_remote_code)


def _takes_weights(path: str | Path) -> bool:
    """Whether what a model is can only be told with its weights."""
    return is_adapter(path) or (Path(path) / "ckpt.pt").is_file()


def newest_model(root: str | Path = "runs") -> Path:
    """The newest finished model or adapter directory under `root`. Raises LandmarkError where there is none."""
    finished = [file.parent for file in Path(root).glob("**/config.json") if _is_finished(file.parent, Path(root))]
    if not finished:
        states = sorted(Path(root).glob(f"**/checkpoints/*/{CHECKPOINT}"), key=lambda file: file.stat().st_mtime)
        way_on = "run landmark train"
        if states:
            run = states[-1].parents[2]
            way_on = (
                f"go on with the run {run} by --resume; `landmark models export {run}` makes a model of what it has"
            )
        raise LandmarkError(
            f"no model was named and none under {root}/ is finished; name one with --model, or {way_on}"
        )
    return max(finished, key=lambda directory: (directory / "config.json").stat().st_mtime)


def _is_finished(directory: Path, root: Path) -> bool:
    """Whether a directory with a config.json has weights beside it and is not being written.

    In checkpoints of unfinished runs and in weight differences the files of weights have other names.
    """
    being_written = any(part.endswith(UNFINISHED) for part in directory.relative_to(root).parts)
    return not being_written and any(any(directory.glob(pattern)) for pattern in FINISHED_WEIGHTS)


@dataclass
class SummaryArguments:
    """The authors' training options, as far as they make the model."""

    n_layer: int
    n_head: int
    n_embd: int
    sequence_length: int
    model: str = "landmark"
    mem_freq: int | None = None
    landmark_id: int = 50260
    dropout: float = 0.0
    bias: bool = False

    def config(self, vocab_size: int, summary: Path) -> GPTConfig:
        """The model's config. Raises LandmarkError for numbers that no model has."""
        landmarks = self.model.startswith("landmark")
        with reading(summary):
            if min(self.n_layer, self.n_head, self.n_embd, self.sequence_length) < 1 or self.n_layer > MOST_MODULES:
                raise ValueError("it describes a model of no size")
            # The arguments of a model without landmarks have a mem_freq too, that of the data, not of the model.
            return GPTConfig(
                vocab_size=vocab_size,
                n_layer=self.n_layer,
                n_head=self.n_head,
                n_embd=self.n_embd,
                dropout=self.dropout,
                bias=self.bias,
                landmark_freq=self.mem_freq if landmarks else None,
                landmark_token_id=self.landmark_id if landmarks else None,
                trained_length=self.sequence_length,
            )


@dataclass
class Summary:
    """summary.json of the authors' lm_benchmark."""

    args: SummaryArguments


def _load_authors(directory: Path, attention: str | None, dtype: str | torch.dtype):
    """A checkpoint of the authors' lm_benchmark: settings from summary.json, weights from ckpt.pt."""
    from landmark_cli.data.tokenizers import load_tokenizer

    summary = directory / "summary.json"
    if not summary.is_file():
        raise LandmarkError(f"{directory} has ckpt.pt but no summary.json, which holds the model's settings")
    check_directory(directory)
    args = read_record(Summary, summary).args
    file = directory / "ckpt.pt"
    with reading(file):
        checkpoint = load_weights(file)
        state = {_plain_name(name): tensor for name, tensor in checkpoint["model"].items()}
        rows = state["transformer.wte.weight"].shape[0]
    config = args.config(rows, summary)
    if attention is not None:
        config._attn_implementation = attention
    with reading(file):
        converted = convert_state(state, config.n_head)
        converted.setdefault("lm_head.weight", converted["model.embed_tokens.weight"])
    # Shapes first: a summary of another model might ask for any amount of memory.
    with reading(summary), torch.device("meta"):
        expected = GPTForCausalLM(config).state_dict()
    for name in expected:
        found = tuple(converted[name].shape) if name in converted else None
        if found != tuple(expected[name].shape):
            raise LandmarkError(
                f"{file} does not fit its summary.json: {name} should be {tuple(expected[name].shape)}, found "
                f"{found or 'nothing'}"
            )
    # What messages call it.
    config.name_or_path = str(directory)
    model = GPTForCausalLM(config)
    model.load_state_dict({name: converted[name] for name in expected})
    if dtype != "auto":
        model = model.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    return model, load_tokenizer("gpt2").as_transformers()


def _plain_name(name: str) -> str:
    """Without the prefixes that torch.compile and DistributedDataParallel put in front."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
