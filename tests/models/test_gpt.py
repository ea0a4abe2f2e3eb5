"""The paper's model as a model of the transformers library: padding."""

import pytest
import torch

from landmark_cli.models import register
from landmark_cli.models.gpt import GPTConfig
from tests.closeness import assert_close_norm
from tests.tiny import tiny_baseline, tiny_model

register()


@pytest.mark.parametrize("make", [tiny_model, tiny_baseline], ids=["landmark", "baseline"])
@pytest.mark.parametrize("left", [0, 7], ids=["right", "left"])
def test_padding_changes_nothing_for_what_is_not_padded(make, left):
    model = make()
    ids = torch.randint(0, 39, (2, 23))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :left], mask[1, 23 + left :] = 0, 0
    rows = torch.full((2, 30), 5)
    rows[0, :23], rows[1, left : 23 + left] = ids
    padded = model(input_ids=rows, attention_mask=mask).logits
    assert_close_norm(padded[1, left : 23 + left], model(input_ids=ids[1:]).logits[0])
    assert_close_norm(padded[0], model(input_ids=rows[:1]).logits[0])


@pytest.mark.parametrize("settings", [{"context_miss_token": True}, {"memory_length": 8, "segment_length": 8}], ids=str)
def test_padding_is_refused_where_it_would_change_the_result(settings):
    model = tiny_model(**settings) if "context_miss_token" in settings else tiny_baseline(**settings)
    mask = torch.ones(1, 8)
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    "setting", [{"layer_norm_eps": "1e-5"}, {"n_layer": 2.0}, {"bias": 1}, {"landmark_freq": "4"}, {"rope_theta": None}]
)
def test_settings_of_another_type_are_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} should be"):
        GPTConfig(**setting)
