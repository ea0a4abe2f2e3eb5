"""The table of families: every entry is true of a model of the family and tried, and no other file knows families."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import landmark_cli
from landmark_cli.errors import LandmarkError
from landmark_cli.families import FAMILIES, fitting
from landmark_cli.models.support import check_model
from landmark_cli.training.setup import LossModel
from tests.models import families, test_support
from tests.modules import load_script
from tests.tiny import tiny_model

PACKAGE = Path(landmark_cli.__file__).parent
DOCUMENTED = (PACKAGE.parent / "docs" / "finetuning.md").read_text(encoding="utf-8")

# By model type: how tests make such a model. `test_decoders` goes through the first, `test_support` through the second.
FITTING = {getattr(transformers, name).model_type: [name, more] for name, more in families.FAMILIES.values()}
REFUSED = {getattr(transformers, name).model_type: [name, more] for name, more, _ in test_support.REFUSED.values()}


tables = load_script(PACKAGE.parent / "docs" / "families.py")


def test_the_tables_of_the_page_are_what_the_models_say():
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page(), "run python docs/families.py"


def untied_model(model_type: str):
    if model_type == "landmark_gpt":
        return tiny_model(tie_word_embeddings=False)
    name, settings = (REFUSED if FAMILIES[model_type].instead_of_rotary else FITTING)[model_type]
    return families.random_decoder(getattr(transformers, name), {**settings, "tie_word_embeddings": False})


def uncapped(model):
    return getattr(model.config, "final_logit_softcapping", 1.0) is None


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.only_with])
def test_the_logits_of_a_model_that_soft_caps_none_are_its_heads_product(model_type):
    model, ids, products = untied_model(model_type), torch.arange(1, 9)[None], []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: products.append(output))
    for cap in (None, 30.0):
        model.config.final_logit_softcapping = cap
        with torch.no_grad():
            logits = model(ids).logits
        assert torch.equal(logits, products[-1]) == LossModel(model, fused_loss=True).fused_loss == (cap is None)


def test_all_that_is_tried_to_fit_is_in_the_table_and_all_in_it_is_tried():
    fit = {model_type for model_type, family in FAMILIES.items() if family.name and not family.instead_of_rotary}
    assert fit == set(FITTING)
    assert {model_type for model_type, family in FAMILIES.items() if family.instead_of_rotary} <= set(REFUSED)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_entry_is_true_of_a_model(model_type, tmp_path):
    family, model = FAMILIES[model_type], untied_model(model_type)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert [name for name, tensor in saved.items() if torch.equal(tensor, head)] == [family.head]
    assert [name for name in saved if name.endswith(family.embedding)] == [
        name for name, tensor in saved.items() if torch.equal(tensor, embedding)
    ]
    assert LossModel(model, fused_loss=True).fused_loss == (family.beyond_head is None or uncapped(model))
    if family.instead_of_rotary:
        with pytest.raises(LandmarkError, match=f"no rotary embedding but {family.instead_of_rotary} .{model_type}"):
            check_model(model, 128, "it")


@pytest.mark.parametrize("model_type", [model_type for model_type, family in FAMILIES.items() if family.name])
def test_messages_and_pages_name_a_family(model_type):
    family = FAMILIES[model_type]
    assert re.search(rf"\b{family.name.split()[0]}\b", DOCUMENTED)
    # A message names no versions.
    stem = re.match(r"[A-Za-z-]+[A-Za-z]", family.name.removesuffix("-MoE"))[0]
    assert bool(re.search(rf"\b{stem}\b", fitting())) == (family.instead_of_rotary is None)


# Files that name a family all the same, and why none of these names has to change when a family is added.
EXCEPTIONS = {
    "families.py": "the table",
    "commands/__init__.py": "names of models people have, in examples",
    "data/tasks/vocabulary.py": "a stone, and whatever else a family shares its name with",
    "commands/finetune.py": "the help names some that people know, and others",
    "models/gpt.py": "our own model, which is defined there",
    "models/import_authors.py": "the names of weights in the authors' checkpoints and in our own model",
    "models/store.py": "the names of weights in the authors' checkpoints and in our own model",
    "models/llama_with_landmark.py": "directories of the authors, who fine-tuned this family only",
    "models/known_layers.py": "the families whose layers are known part by part",
    "models/decoders.py": "the example in a docstring gives one of them landmarks",
    "models/__init__.py": "registers the above",
}


def words_of(model_type: str) -> str:
    """A pattern of all that says that a file knows a family: its type, its classes, its parameters."""
    family = FAMILIES[model_type]
    # Our own model's classes are not foreign to us.
    config_class = CONFIG_MAPPING_NAMES.get(model_type, "landmark_gptConfig")
    weights = [re.escape(name.removesuffix(".weight")) for name in (family.head, family.embedding)]
    classes = f"{config_class.removesuffix('Config')}([A-Z]\\w*)?"
    return rf"\b({model_type}|{classes}|{'|'.join(weights)})\b"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_other_file_knows_a_family(model_type):
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(words_of(model_type), path.read_text(encoding="utf-8"))
    }
    assert found <= set(EXCEPTIONS)


def test_every_exception_is_one():
    for file in EXCEPTIONS:
        text = (PACKAGE / file).read_text(encoding="utf-8")
        assert any(re.search(words_of(model_type), text) for model_type in FAMILIES), file
