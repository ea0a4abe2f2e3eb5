"""Recovering what the authors' weight_diff.py published."""

import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from landmark_cli.errors import LandmarkError
from landmark_cli.weight_diff import authors
from tests.weight_diff.weights import GOLDENS, assert_same_bits, golden, load, recover, save

INVERSE_FREQUENCIES = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]


def ulps(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """The largest distance in units of the last place; both float32 and of the same signs."""
    assert found.dtype == wanted.dtype == torch.float32 and found.shape == wanted.shape
    return int((found.view(torch.int32).long() - wanted.view(torch.int32).long()).abs().max())


@pytest.fixture
def diff(tmp_path):
    """A copy of the authors' difference that a test may change."""
    return shutil.copytree(GOLDENS / "diff", tmp_path / "diff")


@pytest.fixture
def tuned(tmp_path):
    return tmp_path / "out" / "tuned"


def check_tuned(folder):
    found, wanted = load(folder), golden("tuned")
    assert sorted(found) == sorted(wanted)
    assert max(ulps(found[name], wanted[name]) for name in wanted) <= 1


def test_recovers_the_tuned_weights_to_the_last_place(tuned):
    recover(GOLDENS / "raw", GOLDENS / "diff", tuned)
    check_tuned(tuned)


def test_the_result_opens_with_transformers(tuned):
    recover(GOLDENS / "raw", GOLDENS / "diff", tuned)
    model = LlamaForCausalLM.from_pretrained(tuned)
    wanted = golden("tuned")
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tuned)
    assert tokenizer.convert_tokens_to_ids("<landmark>") == json.loads((tuned / "config.json").read_text())["mem_id"]


@pytest.mark.parametrize("raw_kind, diff_kind", [("safetensors", "bin"), ("bin", "safetensors")])
def test_sharded_files_of_both_kinds(tmp_path, diff, tuned, raw_kind, diff_kind):
    raw = save(tmp_path / "raw", golden("raw"), kind=raw_kind, shards=3)
    (diff / "pytorch_model.bin").unlink()
    save(diff, golden("diff"), kind=diff_kind, shards=2)
    recover(raw, diff, tuned, max_shard_size="200kB")
    assert len(list(tuned.glob("model-*.safetensors"))) > 2
    check_tuned(tuned)
    assert LlamaForCausalLM.from_pretrained(tuned).config.vocab_size == 302


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_in_16_bits_is_added_in_float32(tmp_path, diff, tuned, dtype):
    raw = {name: tensor.to(dtype) for name, tensor in golden("raw").items()}
    recover(save(tmp_path / "raw", raw), diff, tuned, verify=False)
    found, change = load(tuned), golden("diff")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(found[name], change[name] + raw[name].float())
    head = torch.cat([raw["lm_head.weight"].float(), raw["lm_head.weight"].float().mean(0).expand(2, -1)])
    assert torch.equal(found["lm_head.weight"], change["lm_head.weight"] + head)


def test_buffers_that_raw_does_not_store_are_computed(tmp_path, tuned):
    raw = {name: tensor for name, tensor in golden("raw").items() if name not in INVERSE_FREQUENCIES}
    recover(save(tmp_path / "raw", raw), GOLDENS / "diff", tuned)
    check_tuned(tuned)


def test_buffers_that_only_raw_has_are_carried(diff, tuned):
    change = {name: tensor for name, tensor in golden("diff").items() if name not in INVERSE_FREQUENCIES}
    torch.save(change, diff / "pytorch_model.bin")
    recover(GOLDENS / "raw", diff, tuned)
    check_tuned(tuned)


def test_buffers_that_only_the_difference_has_are_carried(tmp_path, diff, tuned):
    extra = {"model.layers.0.scale": torch.tensor([0.25, -0.25]), "model.steps": torch.tensor(3)}
    torch.save(golden("diff") | extra, diff / "pytorch_model.bin")
    recover(GOLDENS / "raw", diff, tuned)
    assert_same_bits({name: load(tuned)[name] for name in extra}, extra)


def test_the_head_of_a_raw_model_that_ties_it_is_its_embedding(tmp_path, diff, tuned):
    raw = golden("raw")
    raw["lm_head.weight"] = raw["model.embed_tokens.weight"]
    torch.save(raw | {"lm_head.weight": raw["lm_head.weight"].clone()}, tmp_path / "untied.bin")
    (diff / authors.CHECKSUM).unlink()
    whole = save(tmp_path / "whole", torch.load(tmp_path / "untied.bin"), kind="bin")
    del raw["lm_head.weight"]
    tied = save(tmp_path / "tied", raw)
    recover(whole, diff, tuned, verify=False)
    recover(tied, diff, tmp_path / "second", verify=False)
    assert_same_bits(load(tmp_path / "second"), load(tuned))


def test_a_wrong_sum_leaves_nothing_behind(diff, tuned):
    (diff / authors.CHECKSUM).write_text("321.73")
    with pytest.raises(LandmarkError, match=r"sum of the recovered tensors is 321\.7077.*says 321\.73.*--no-verify"):
        recover(GOLDENS / "raw", diff, tuned)
    assert not any(tuned.parent.iterdir())
    recover(GOLDENS / "raw", diff, tuned, verify=False)
    check_tuned(tuned)


def test_a_sum_within_the_tolerance_is_right(diff, tuned):
    (diff / authors.CHECKSUM).write_text("321.7167")
    recover(GOLDENS / "raw", diff, tuned)


def test_without_a_file_the_sum_is_that_of_the_first_release(diff, tuned, monkeypatch):
    (diff / authors.CHECKSUM).unlink()
    with pytest.raises(LandmarkError, match=r"first release is 49798\.7656"):
        recover(GOLDENS / "raw", diff, tuned)
    monkeypatch.setattr(authors, "FIRST_RELEASE_SUM", 321.7077)
    recover(GOLDENS / "raw", diff, tuned)


def test_the_sum_may_have_been_taken_in_float32_on_the_way():
    sums = [16_777_216.0, 0.75, 0.75, 0.75]
    assert authors._total(sums) == (16_777_218.25, 16_777_216.0)


def test_a_sum_file_that_holds_no_number(diff, tuned):
    (diff / authors.CHECKSUM).write_text("sum")
    with pytest.raises(LandmarkError, match="checksum_psum.txt cannot be read: could not convert"):
        recover(GOLDENS / "raw", diff, tuned)
