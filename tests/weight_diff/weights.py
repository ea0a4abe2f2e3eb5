"""Directories of weights for the tests of `landmark weight-diff`, and the command itself."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from landmark_cli.commands.weight_diff import MakeOptions, RecoverOptions, run_make, run_recover
from landmark_cli.weight_diff import manifest
from tests.forked import Forked

GOLDENS = Path(__file__).parent.parent / "goldens" / "weight_diff"


def golden(name: str) -> dict[str, torch.Tensor]:
    """raw, tuned or diff of the authors, in float32."""
    return torch.load(GOLDENS / name / "pytorch_model.bin", weights_only=True)


def save(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    kind: str = "safetensors",
    shards: int = 1,
    config: dict | None = None,
) -> Path:
    """Write a directory of weights, the config of the golden of the same number of tokens by default."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    write = {"safetensors": save_file, "bin": torch.save}[kind]
    if config is None:
        rows = tensors["model.embed_tokens.weight"].shape[0]
        config = json.loads((GOLDENS / ("raw" if rows == 300 else "tuned") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write(tensors, folder / f"{stem}.{kind}")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.{kind}"
        part = dict(list(tensors.items())[shard::shards])
        write(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory of safetensors files."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def make(raw: Path, tuned: Path, diff: Path, **options) -> Path:
    run_make(MakeOptions(str(raw), str(tuned), diff, **options))
    return diff


def recover(raw: Path, diff: Path, tuned: Path, **options) -> Path:
    run_recover(RecoverOptions(str(raw), str(diff), tuned, **options))
    return tuned


def write_manifest(diff: Path, content: dict) -> None:
    """Write a manifest with the checksum that fits it, as somebody would who means harm."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    (diff / manifest.MANIFEST).write_text(json.dumps(content | {"sha256": manifest._digest(content)}))


def landmark(*arguments: object) -> SimpleNamespace:
    """Run `landmark weight-diff ...`: its returncode, and what it says on stderr."""
    with TemporaryDirectory() as folder:
        run = Forked(["weight-diff", *arguments], Path(folder) / "said.txt")
        return SimpleNamespace(returncode=run.wait(), stderr=run.said.read_text())
