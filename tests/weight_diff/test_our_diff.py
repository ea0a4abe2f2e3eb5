"""Our own format: every bit comes back, whatever the types, files and shapes; and it is no model."""

import json

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from landmark_cli.weight_diff import bits, manifest
from tests.weight_diff.weights import GOLDENS, assert_same_bits, golden, load, make, recover, save


def cast(tensors, dtype):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, shards", [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)])
def test_round_trip_is_exact(tmp_path, dtype, kind, shards):
    wanted = cast(golden("tuned"), dtype)
    raw = save(tmp_path / "raw", cast(golden("raw"), dtype), kind=kind, shards=shards)
    tuned = save(tmp_path / "tuned", wanted, kind=kind, shards=shards)
    diff = make(raw, tuned, tmp_path / "diff", max_shard_size="100kB")
    assert_same_bits(load(recover(raw, diff, tmp_path / "out", max_shard_size="150kB")), wanted)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype in (dtype, torch.float32)


def test_the_goldens_come_back_and_so_do_config_and_tokenizer(tmp_path):
    diff = make(GOLDENS / "raw", GOLDENS / "tuned", tmp_path / "diff")
    out = recover(GOLDENS / "raw", diff, tmp_path / "out")
    assert_same_bits(load(out), golden("tuned"))
    carried = {path.name for path in (GOLDENS / "tuned").iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == carried | {"model.safetensors"}
    assert all((out / name).read_bytes() == (GOLDENS / "tuned" / name).read_bytes() for name in carried)


@pytest.mark.parametrize("made_from", [torch.float32, torch.float16])
def test_raw_in_another_type_is_cast_to_that_of_tuned(tmp_path, made_from):
    """The maker's raw weights and the user's may be stored in different types, as long as they mean the same."""
    wanted = cast(golden("tuned"), torch.bfloat16)
    values = cast(golden("raw"), torch.float16)
    maker = save(tmp_path / "maker", cast(values, made_from))
    diff = make(maker, save(tmp_path / "tuned", wanted), tmp_path / "diff")
    for number, dtype in enumerate((torch.float16, torch.float32, torch.bfloat16, torch.float64)):
        user = save(tmp_path / f"user{number}", cast(values, dtype), kind="bin")
        assert_same_bits(load(recover(user, diff, tmp_path / f"out{number}")), wanted)


def test_every_kind_of_tensor_comes_back(tmp_path):
    """Not finite, empty, without dimensions, with strides, integers, only on one side, of other types on both sides."""
    raw, tuned = golden("raw"), cast(golden("tuned"), torch.bfloat16)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, -float("inf"), 3.4e38, 0.0, -1.0] * 8)
    raw["model.norm.weight"], tuned["model.norm.weight"] = special.flip(0), special.bfloat16()
    name = "model.layers.0.self_attn.q_proj.weight"
    tuned[name] = tuned[name].t()
    raw[name] = raw[name][:, ::2].repeat_interleave(2, 1).t()
    tuned["model.empty"] = torch.empty(0, 3)
    tuned["model.number"], raw["model.number"] = torch.tensor(7), torch.tensor(5.0)
    tuned["model.mask"], raw["model.mask"] = torch.tensor([True, False]), torch.tensor([True, True])
    raw["model.only_raw"] = torch.ones(3)
    raw_folder = save(tmp_path / "raw", raw, kind="bin")
    diff = make(raw_folder, save(tmp_path / "tuned", tuned, kind="bin"), tmp_path / "diff")
    assert_same_bits(load(recover(raw_folder, diff, tmp_path / "out")), tuned)


def test_tied_tensors_are_stored_once_and_recovered_under_both_names(tmp_path):
    tuned = golden("tuned")
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    raw = golden("raw")
    del raw["lm_head.weight"]
    raw_folder = save(tmp_path / "raw", raw)
    diff = make(raw_folder, save(tmp_path / "tuned", tuned, kind="bin"), tmp_path / "diff")
    assert "diff.lm_head.weight" not in load_file(diff / "diff.safetensors")
    assert_same_bits(load(recover(raw_folder, diff, tmp_path / "out")), tuned)


def test_an_untied_head_over_a_tied_one_is_a_difference_from_the_embedding(tmp_path):
    raw, tuned = golden("raw"), golden("tuned")
    del raw["lm_head.weight"]
    tuned["lm_head.weight"] = torch.cat([raw["model.embed_tokens.weight"] * 1.001, torch.ones(2, 64)])
    raw_folder = save(tmp_path / "raw", raw)
    diff = make(raw_folder, save(tmp_path / "tuned", tuned), tmp_path / "diff")
    entry = json.loads((diff / manifest.MANIFEST).read_text())["tensors"]["lm_head.weight"]
    assert entry["raw"]["name"] == "model.embed_tokens.weight"
    assert_same_bits(load(recover(raw_folder, diff, tmp_path / "out")), tuned)


def test_new_rows_are_stored_as_they_are_and_old_ones_are_not(tmp_path):
    diff = make(GOLDENS / "raw", GOLDENS / "tuned", tmp_path / "diff")
    stored = load_file(diff / "diff.safetensors")["diff.model.embed_tokens.weight"]
    wanted = golden("tuned")["model.embed_tokens.weight"]
    assert torch.equal(stored[300:].view(torch.float32), wanted[300:])
    assert not (stored[:300].view(torch.float32) == wanted[:300]).any()


def test_a_difference_is_not_loaded_as_a_model(tmp_path):
    diff = make(GOLDENS / "raw", GOLDENS / "tuned", tmp_path / "diff")
    assert "not a model" in json.loads((diff / "config.json").read_text())["note"]
    with pytest.raises(ValueError, match="landmark_weight_diff"):
        AutoConfig.from_pretrained(diff)
    with pytest.raises(ValueError, match="landmark_weight_diff"):
        AutoModelForCausalLM.from_pretrained(diff)
    for folder in (diff, diff / "tuned"):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype, code", [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
@pytest.mark.parametrize("change", [1e-5, 1e-4, 1e-3])
def test_compresses_better_than_a_float_difference(dtype, code, change):
    torch.manual_seed(0)
    raw = (torch.randn(200_000) * 0.02).to(dtype)
    tuned = (raw.float() + torch.randn(200_000) * change).to(dtype)
    raw_bits, tuned_bits = (tensor.view(torch.uint8).numpy().view(bits.pattern(code)) for tensor in (raw, tuned))
    ours = bits.difference(tuned_bits, raw_bits, np.empty_like(raw_bits), np.empty_like(raw_bits))
    exact = tuned.float() - raw.float()
    for floats in (exact, exact.to(dtype)):
        rival = zstandard.compress(floats.view(torch.uint8).numpy().tobytes(), 3)
        assert len(zstandard.compress(ours.tobytes(), 3)) < len(rival)
