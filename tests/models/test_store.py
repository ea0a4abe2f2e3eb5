"""Opening models: our directories, the authors' checkpoints, and what is none of them."""

import json
import os
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import landmark_cli.models.store as store
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.models.lora import LoraSettings, add_adapters, save_adapters
from tests import goldens
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder

TOLERANCE = 1e-5


def tiny_model(**options) -> GPTForCausalLM:
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig(vocab_size=50304, n_layer=1, n_head=2, n_embd=8, **options)).eval()


@pytest.mark.parametrize(
    "options", [{}, {"landmark_freq": None}, {"landmark_freq": None, "memory_length": 4, "segment_length": 4}]
)
def test_a_saved_model_opens_with_its_own_attention(tmp_path, options):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path)
    load_tokenizer("gpt2").save_pretrained(tmp_path)
    opened, tokenizer = store.load(tmp_path, device="cpu")
    ids = torch.tensor([tokenizer("It is a truth universally acknowledged").input_ids])
    assert torch.equal(opened(ids).logits, model(ids).logits)
    assert opened.config._attn_implementation == model.config._attn_implementation
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPTForCausalLM
    assert store.load(tmp_path, attention="sdpa", device="cpu")[0].config._attn_implementation == "sdpa"
    assert store.load(tmp_path, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def authors_checkpoint(folder, prefix="", **changes):
    spec, tensors = goldens.read("gpt_forward_0")
    state = {prefix + name: t for name, t in goldens.part(tensors, "w.").items()}
    state[prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    torch.save({"model": state, "itr": 10, "optimizer": {}, "scheduler": {}}, folder / "ckpt.pt")
    args = {"model": "landmark", "n_layer": 3, "n_head": 4, "n_embd": 64, "sequence_length": 204, "mem_freq": 50}
    args |= {"landmark_id": spec["landmark_id"], "bias": False, "dropout": 0.0, "device": None} | changes
    (folder / "summary.json").write_text(json.dumps({"args": args}))
    return tensors


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_the_authors_checkpoints(tmp_path, prefix):
    tensors = authors_checkpoint(tmp_path, prefix)
    model, tokenizer = store.load(tmp_path, device="cpu")
    assert_close_norm(model(tensors["ids"]).logits, tensors["logits"], within=TOLERANCE)
    assert (model.config.landmark_freq, model.config.landmark_token_id, model.config.trained_length) == (50, 95, 204)
    assert tokenizer.convert_tokens_to_ids("<landmark>") == 50260


def test_the_authors_baseline_has_no_landmarks(tmp_path):
    authors_checkpoint(tmp_path, model="base_rotary")
    model, _ = store.load(tmp_path, device="cpu")
    assert model.config.landmark_freq is None and model.config._attn_implementation == "sdpa"
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)


def test_a_checkpoint_that_does_not_fit_its_summary(tmp_path):
    authors_checkpoint(tmp_path, n_layer=4)
    with pytest.raises(LandmarkError, match=r"layers\.3\.attention.* found nothing"):
        store.load(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(LandmarkError, match="no summary"):
        store.load(tmp_path)


def test_what_is_no_model(tmp_path):
    with pytest.raises(LandmarkError, match="is not there"):
        store.load(tmp_path / "nowhere")
    with pytest.raises(LandmarkError, match="no config"):
        store.load(tmp_path)
    with pytest.raises(LandmarkError, match="landmark train"):
        store.newest_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "landmark_diff.json").write_text("{}")
    (tmp_path / "diff.safetensors").touch()
    with pytest.raises(LandmarkError, match="weight-diff recover"):
        store.load(tmp_path)
    with pytest.raises(LandmarkError, match="landmark train"):
        store.newest_model(tmp_path)


def test_a_run_that_is_not_finished_is_named_where_no_model_is(tmp_path):
    for name in ("step-00000001", "step-00000002"):
        (tmp_path / "stopped" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "stopped" / "checkpoints" / name / "training.json").touch()
    with pytest.raises(LandmarkError, match=f"--resume; `landmark models export {tmp_path}/stopped` makes"):
        store.newest_model(tmp_path)
    tiny_model().save_pretrained(tmp_path / "finished")
    assert store.newest_model(tmp_path) == tmp_path / "finished"


def test_newest_model_is_the_last_finished(tmp_path):
    for name in ("a", "b"):
        tiny_model().save_pretrained(tmp_path / name)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    assert store.newest_model(tmp_path) == tmp_path / "b"


def finished_adapters(directory):
    adapted = add_adapters(tiny_decoder("llama"), LoraSettings(2, 4.0))
    save_adapters(adapted, directory, adapted.state_dict())


FORMS = {
    "whole": lambda directory: tiny_model().save_pretrained(directory),
    "sharded": lambda directory: tiny_model().save_pretrained(directory, max_shard_size=6000),
    "adapters": finished_adapters,
}


@pytest.mark.parametrize("form", FORMS)
def test_newest_model_is_found_in_any_form_but_not_while_it_is_written(tmp_path, form):
    FORMS["whole"](tmp_path / "older")
    long_ago = time.time() - 100
    os.utime(tmp_path / "older/config.json", (long_ago, long_ago))
    FORMS[form](tmp_path / "newer")
    assert store.newest_model(tmp_path) == tmp_path / "newer"
    for place in ("run/model.partial", "new.unfinished", "new.replaced"):
        FORMS[form](tmp_path / place)
    assert store.newest_model(tmp_path) == tmp_path / "newer"
