"""Model directories from anywhere: no code in them runs, no file outside is opened, no memory is taken for nothing."""

import json
import random
import resource
import shutil
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from landmark_cli import model_files
from landmark_cli.errors import LandmarkError
from landmark_cli.model_files import opening
from landmark_cli.models import lora, store
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.pretrained import open_config
from landmark_cli.weight_diff.checkpoint import locate
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.models.test_store import authors_checkpoint

SECONDS = 10
# Ended by this, a test took memory that nobody had to give.
MEMORY = 2 << 30


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A landmark decoder, adapters for one, and a checkpoint of the authors'."""
    root = tmp_path_factory.mktemp("saved")
    model, tokenizer = tiny_decoder("llama"), tiny_tokenizer()
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    add_landmarks(model, tokenizer, landmark_freq=7, trained_length=64)
    for name in ("decoder", "sharded"):
        model.save_pretrained(root / name, max_shard_size="50kB" if name == "sharded" else "1GB")
        tokenizer.save_pretrained(root / name)
    model.config._name_or_path = str(root / "base")
    adapted = lora.add_adapters(model, lora.LoraSettings(rank=2, alpha=4.0))
    lora.save_adapters(adapted, root / "adapters", adapted.state_dict())
    tokenizer.save_pretrained(root / "adapters")
    (root / "authors").mkdir()
    authors_checkpoint(root / "authors")
    return root


@pytest.fixture
def copy(saved, tmp_path):
    return lambda name: shutil.copytree(saved / name, tmp_path / name)


@pytest.fixture(autouse=True)
def bounded():
    """No test takes much memory or time."""
    started, before = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < SECONDS


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["decoder", "sharded", "adapters", "authors"])
def test_all_of_them_open(saved, name):
    assert store.load(saved / name, device="cpu")[0].config.landmark_freq


def refused(match, directory):
    """Opening it is an error of one line that names it. match: what else the line says, or None."""
    with pytest.raises(LandmarkError, match=match) as error:
        store.load(directory, device="cpu")
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("decoder", {"hidden_size": 16_000_000}),
        ("decoder", {"intermediate_size": 16_000_000}),
        ("decoder", {"vocab_size": 1_600_000_000}),
        ("decoder", {"num_hidden_layers": 1_000_000_000}),
        ("decoder", {"num_hidden_layers": 4000}),
        ("decoder", {"num_attention_heads": 1_000_000}),
        ("decoder", {"head_dim": 2_000_000_000}),
        ("decoder", {"hidden_size": 2**62}),
        ("decoder", {"hidden_size": 0}),
        ("decoder", {"num_attention_heads": 0}),
        ("decoder", {"hidden_size": "64"}),
        ("decoder", {"vocab_size": None}),
        ("decoder", {"landmark_freq": 0}),
        ("decoder", {"landmark_freq": "7"}),
        ("decoder", {"landmark_freq": 7.5}),
        ("decoder", {"landmark_token_id": -1}),
        ("decoder", {"landmark_token_id": None}),
        ("decoder", {"trained_length": None}),
        ("decoder", {"trained_length": [64]}),
        ("decoder", {"top_k_blocks": 2**70}),
        ("decoder", {"model_type": ["llama"]}),
        ("adapters", {"vocab_size": 16_000_000}),
        ("adapters", {"hidden_size": -1}),
    ],
)
def test_a_config_of_no_such_model(copy, name, setting):
    directory = copy(name)
    change(directory / "config.json", **setting)
    refused(None, directory)


@pytest.mark.parametrize(
    "setting",
    [
        {"n_embd": 16_000_000},
        {"n_layer": 10**9},
        {"n_head": 0},
        {"n_layer": "3"},
        {"sequence_length": -1},
        {"n_head": 3},
    ],
)
def test_a_summary_of_no_such_model(tmp_path, setting):
    authors_checkpoint(tmp_path, **setting)
    refused("summary.json", tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"r": 16_000_000},
        {"r": "2"},
        {"rank_pattern": {"q_proj": 10**9}},
        {"layer_replication": [[0, 10**9]]},
        {"peft_type": "PROMPT_TUNING"},
        {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"}},
        {"base_model_name_or_path": 3},
        {"base_model_name_or_path": None},
        {"target_modules": 5},
    ],
)
def test_an_adapter_config_of_no_such_adapters(copy, setting):
    directory = copy("adapters")
    change(directory / "adapter_config.json", **setting)
    refused(None, directory)


@pytest.mark.parametrize(
    "elsewhere", ["../decoder/model.safetensors", "/etc/hostname", "a/../../x", "link.safetensors"]
)
def test_an_index_that_leads_outside(copy, saved, elsewhere):
    directory = copy("sharded")
    (directory / "link.safetensors").symlink_to(saved / "decoder" / "model.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    weight_map = index["weight_map"] | {"model.norm.weight": elsewhere}
    change(directory / "model.safetensors.index.json", weight_map=weight_map)
    refused("outside of the directory", directory)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_that_leads_outside(copy, tmp_path, file):
    directory = copy("decoder")
    shutil.move(directory / file, tmp_path / "elsewhere")
    (directory / file).symlink_to(tmp_path / "elsewhere")
    refused("is a link to .*, outside of the directory", directory)


def test_files_that_configs_name(copy, tmp_path):
    directory = copy("decoder")
    (tmp_path / "vocab.json").write_text("{}")
    change(directory / "tokenizer_config.json", vocab_file="/nowhere/vocab.json", special_tokens_map_file="/etc/hosts")
    store.load(directory, device="cpu")
    change(directory / "tokenizer_config.json", vocab_file=str(tmp_path / "vocab.json"))
    refused("names a file outside of the directory", directory)
    change(directory / "tokenizer_config.json", vocab_file=None)
    change(directory / "config.json", transformers_weights="../sharded/model-00001-of-00004.safetensors")
    refused("names a file outside of the directory", directory)


def test_a_hub_cache_is_links_and_opens(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--org--x" / "blobs", tmp_path / "models--org--x" / "snapshots" / "0123"
    shutil.copytree(saved / "sharded", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert store.load(snapshot, device="cpu")[0].config.landmark_freq == 7


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_of_the_hub_is_not_asked_for(copy, key):
    directory = copy("decoder")
    change(directory / "config.json", **{key: "somebody/kernels"})
    refused("asks for code of another repository", directory)


def test_a_tensor_larger_than_its_file(copy):
    directory = copy("authors")
    content = torch.load(directory / "ckpt.pt", weights_only=True)
    content["model"]["transformer.wte.weight"] = torch.zeros(1, 64).expand(1 << 32, 64)
    torch.save(content, directory / "ckpt.pt")
    refused("larger .* than what the file stores", directory)
    directory = copy("decoder")
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    state["model.norm.weight"] = torch.zeros(1).expand(1 << 40)
    torch.save(state, directory / "pytorch_model.bin")
    refused(None, directory)


FUZZED = [("decoder", name) for name in ("config.json", "tokenizer_config.json", "generation_config.json")]
FUZZED += [("sharded", "model.safetensors.index.json"), ("adapters", "adapter_config.json")]
FUZZED += [("authors", "summary.json"), ("decoder", "model.safetensors")]
VALUES = [None, True, -1, 0, 1.5, 10**9, 2**70, "", "x", "../x", [], [[]], {}, {"a": None}, float("nan")]


@pytest.mark.parametrize(("name", "file"), FUZZED, ids=lambda part: part)
def test_damaged_files_raise_nothing_else(copy, name, file):
    """Bytes changed, and values of another type in well-formed JSON: it opens, or one line says what is wrong."""
    directory, draw = copy(name), random.Random(file)
    content = (directory / file).read_bytes()
    for number in range(12):
        damaged = bytearray(content)
        if file.endswith(".json") and number % 3:
            fields = json.loads(content)
            inner = fields["args"] if "args" in fields else fields
            inner[draw.choice(sorted(inner))] = draw.choice(VALUES)
            damaged = json.dumps(fields).encode()
        else:
            at = draw.randrange(min(len(damaged), 4000))
            damaged[at : at + draw.randrange(5)] = draw.randbytes(draw.randrange(5))
        (directory / file).write_bytes(damaged)
        try:
            open_config(directory) if name == "decoder" and number % 2 else store.load(directory, device="cpu")
        except LandmarkError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer.model", "chat_template.jinja", "code.py"])
def test_a_vocabulary_of_gigabytes_is_not_read(copy, name):
    directory = copy("decoder")
    with (directory / name).open("ab") as file:
        file.truncate(4 << 30)
    with pytest.raises(LandmarkError, match=rf"{name} cannot be read: it has 4,294,967,296 bytes, and at most"):
        store.load(directory)


def test_a_header_of_a_million_tensors_is_not_read(copy):
    directory = copy("decoder")
    entry = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % number for number in range(1_000_000)) + "}").encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(LandmarkError, match=r"model.safetensors cannot be read: its header has 5\d,\d+,\d+ bytes"):
        store.load(directory)


@pytest.mark.parametrize("where", ["a model or tokenizer", "a weight difference"])
def test_who_names_no_directory_is_told_that_the_hub_is_asked(where, monkeypatch, tmp_path, capsys):
    """Before anything is asked, once, and of nothing that the cache has or that is no name on the hub."""

    def ask(name):
        with pytest.raises(LandmarkError, match="the hub"):
            if where == "a weight difference":
                locate(name, "--path-raw")
            else:
                with opening(name, "the model", trust_remote_code=False):
                    raise OSError("there is no network")

    def unreachable(*arguments, **options):
        raise OSError("there is no network")

    model_files.tell_of_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "models--nobody--cached").mkdir()
    for name in ("nobody/nothing", "nobody/nothing", "nobody/cached", "a/b..c"):
        ask(name)
    said = [line for line in capsys.readouterr().err.splitlines() if "asking" in line]
    assert len(said) == 1 and said[0].startswith("there is no directory nobody/nothing: asking https://")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ask("nobody/offline")
    assert "asking" not in capsys.readouterr().err
    model_files.tell_of_hub.cache_clear()
