"""What is kept beside a base model, for every family of decoders: adapters, and differences of weights."""

import pytest
import torch

from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.lora import LoraSettings, add_adapters, save_adapters
from tests.closeness import assert_close_norm
from tests.models.families import FAMILIES, tiny_decoder, tiny_tokenizer
from tests.models.test_decoders import BLOCK, FREQ, LENGTH, texts
from tests.weight_diff.weights import assert_same_bits, load, make, recover

# One of each class: what tells the others apart is in no file of weights.
CLASSES = {config_class: family for family, (config_class, _) in reversed(FAMILIES.items())}.values()


@pytest.fixture
def landmark_model(request, tmp_path):
    """A decoder as a user has it on disk, opened and given landmarks, and its tokenizer."""
    tiny_decoder(request.param).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = store.load(tmp_path / "base", device="cpu")
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH)
    return model, tokenizer


@pytest.mark.parametrize("landmark_model", CLASSES, indirect=True)
@torch.no_grad()
def test_adapters_come_back(landmark_model, tmp_path):
    model, tokenizer = landmark_model
    adapted = add_adapters(model, LoraSettings(2, 4.0)).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.2)
    ids = texts(1, 4 * BLOCK)
    ids[:, FREQ::BLOCK] = model.config.landmark_token_id
    expected = adapted(ids).logits
    save_adapters(adapted, tmp_path / "adapters", adapted.state_dict())
    tokenizer.save_pretrained(tmp_path / "adapters")
    opened, _ = store.load(tmp_path / "adapters", device="cpu")
    assert_close_norm(opened(ids).logits, expected)
    plain = {name: value for name, value in vars(opened.config).items() if name.startswith("landmark_")}
    assert plain == {name: value for name, value in vars(model.config).items() if name.startswith("landmark_")}
    plain, _ = store.load(tmp_path / "adapters", attention="sdpa", device="cpu")
    # The first block has no landmark in front of it.
    assert_close_norm(plain(ids).logits[:, :FREQ], expected[:, :FREQ])


@pytest.mark.parametrize("landmark_model", CLASSES, indirect=True)
@torch.no_grad()
def test_a_difference_comes_back(landmark_model, tmp_path):
    model, tokenizer = landmark_model
    for weight in model.parameters():
        weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    diff = make(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff")
    found = recover(tmp_path / "base", diff, tmp_path / "out")
    assert_same_bits(load(found), load(tmp_path / "tuned"))
    assert store.load(found, device="cpu")[0].config._attn_implementation == "landmark"
