"""Opening directories: the original project's, and those in which something is missing or does not match."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from landmark_cli.errors import LandmarkError
from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.pretrained import open_config, open_pretrained, plain_attention
from landmark_cli.models.support import check_config
from tests import goldens
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder, tiny_tokenizer


@pytest.fixture
def directory(tmp_path):
    """A landmark decoder as it is saved."""
    model, tokenizer = tiny_decoder("llama"), tiny_tokenizer()
    add_landmarks(model, tokenizer, landmark_freq=7, trained_length=64)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def change_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_directories_of_the_original_project(tmp_path, form):
    spec, tensors = goldens.read("llama_forward_51")
    weights = goldens.part(tensors, "w.")
    if form == "bin":
        # As old versions saved it, with the table that is no parameter.
        table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        torch.save(weights | table, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama_with_landmark",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 96,
        "mem_freq": spec["block_size"] - 1,
        "mem_id": spec["landmark_id"],
        "train_context_length": 512,
        "include_landmark_in_loss": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(model) is LlamaForCausalLM and model.config._attn_implementation == "landmark"
    settings = [getattr(model.config, name) for name in ("landmark_freq", "landmark_token_id", "trained_length")]
    assert settings == [15, 95, 512] and model.config.include_landmark_in_loss and model.config.top_k_blocks == 4
    assert_close_norm(model(tensors["ids"]).logits, tensors["logits"], within=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert plain.config._attn_implementation == "sdpa"

    model.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert (again.model_type, again.landmark_freq, hasattr(again, "mem_freq")) == ("llama", 15, False)

    change_config(tmp_path, mem_id=None)
    with pytest.raises(LandmarkError, match='no "mem_id"'):
        open_config(tmp_path)


def test_weights_of_another_shape(directory):
    change_config(directory, intermediate_size=32)
    with pytest.raises(LandmarkError, match=r"mlp\.down_proj\.weight is \(32, 48\) there and \(32, 32\) by"):
        store.load(directory)


def test_weights_with_a_layer_less(directory):
    change_config(directory, num_hidden_layers=3)
    with pytest.raises(LandmarkError, match=r"do not match .* model\.layers\.2\.\S+ is missing"):
        store.load(directory)


def test_weights_with_a_layer_more(directory):
    change_config(directory, num_hidden_layers=1)
    with pytest.raises(LandmarkError, match=r"do not match .*model\.layers\.1\.\S+, but config.json has 1 layers"):
        store.load(directory)


def test_weights_cut_short(directory):
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(LandmarkError, match=r"the files hold 1\.0 kB; they are cut short"):
        store.load(directory)
    file.write_bytes(content[:-1000])
    with pytest.raises(LandmarkError, match="cannot be read: .*header"):
        store.load(directory)
    file.unlink()
    with pytest.raises(LandmarkError, match="model.safetensors"):
        store.load(directory)


def test_weights_that_nothing_reads_are_no_fault(directory):
    file = directory / "model.safetensors"
    save_file(load_file(file) | {"value_head.weight": torch.ones(1)}, file, metadata={"format": "pt"})
    assert store.load(directory, device="cpu")[0].config.landmark_freq == 7


def test_the_tokenizer_has_to_know_the_landmark(directory):
    tiny_tokenizer().save_pretrained(directory)
    with pytest.raises(LandmarkError, match="no landmark token, but the model's landmark is token 258"):
        store.load(directory)


def test_no_tokenizer(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(LandmarkError, match="the tokenizer .* cannot be read"):
        store.load(directory)


def test_a_model_of_an_unknown_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(LandmarkError, match="no_such_thing"):
        store.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LandmarkError, match="not JSON"):
        store.load(tmp_path)


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(LandmarkError, match="an encoder"):
        check_config(open_config(tmp_path), str(tmp_path))


@pytest.mark.parametrize("says", [True, False], ids=["transformers says it can", "transformers says it cannot"])
def test_a_soft_cap_is_never_left_out(says, tmp_path, monkeypatch):
    """Whatever transformers says of the class: some of its versions let Gemma 2 have an attention without soft caps."""
    capped, unbounded = (tiny_decoder(family) for family in ("gemma2", "gemma2-unbounded"))
    monkeypatch.setattr(type(capped), "_supports_sdpa", says)
    assert plain_attention(capped.config) == "eager"
    assert plain_attention(unbounded.config) == ("sdpa" if says else "eager")
    capped.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    opened = open_pretrained(tmp_path, attention="sdpa")[0].eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, capped(ids).logits)
        capped.set_attn_implementation("eager")
        assert torch.equal(opened(ids).logits, capped(ids).logits)
