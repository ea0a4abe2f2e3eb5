"""Model cards: written with a model, and kept where transformers would put its own in their place."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import hub

from landmark_cli.models.card import CARD, TAG, model_card
from tests.tiny import tiny_baseline, tiny_llama, tiny_model

EDITED = f"---\nlibrary_name: transformers\ntags:\n- {TAG}\n---\n# Mine\n\nIt was read by candlelight.\n"


@pytest.fixture
def uploads(monkeypatch):
    """Stands for the hub: `there` is its card, `sent` what was uploaded, by name."""
    found = SimpleNamespace(there=None, sent={})

    def commit(repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as file:
                found.sent[operation.path_in_repo] = file.read()

    api = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name),
        create_commit=commit,
        create_branch=lambda **_: None,
    )
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: api, raising=False)
    load = ModelCard.load.__func__

    def card_of(cls, name, **arguments):
        if name != "me/mine":
            return load(cls, name, **arguments)
        if found.there is None:
            raise EntryNotFoundError("no README.md")
        return ModelCard(found.there)

    monkeypatch.setattr(ModelCard, "load", classmethod(card_of))
    return found


def push(model, way, tmp_path):
    if way == "push_to_hub":
        model.push_to_hub("me/mine", tags=["novels"])
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/mine")


WAYS = pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])


@WAYS
@pytest.mark.parametrize("make", [tiny_model, tiny_baseline])
def test_a_model_takes_its_card_to_the_hub(uploads, way, make, tmp_path):
    model = make()
    push(model, way, tmp_path)
    sent = ModelCard(uploads.sent[CARD].decode())
    assert sent.text.strip() == ModelCard(model_card(model)).text.strip()
    assert sent.data.tags == [TAG, "novels"][: 1 + (way == "push_to_hub")]
    assert "model.safetensors" in uploads.sent


@WAYS
def test_a_card_that_was_edited_is_the_one_that_is_uploaded(uploads, way, tmp_path):
    folder = tmp_path / "saved"
    tiny_model().save_pretrained(folder)
    (folder / CARD).write_text(EDITED)
    push(type(tiny_model()).from_pretrained(folder), way, tmp_path)
    assert "by candlelight" in uploads.sent[CARD].decode()
    assert "by candlelight" in (folder / CARD).read_text()


@WAYS
def test_a_card_on_the_hub_stays_unless_it_is_the_empty_one(uploads, way, tmp_path):
    uploads.there = "---\nlicense: mit\n---\n# Of the hub\n"
    push(tiny_model(), way, tmp_path)
    assert "# Of the hub" in uploads.sent[CARD].decode()
    uploads.there = None
    tiny_llama().push_to_hub("me/mine")
    uploads.there = uploads.sent[CARD].decode()
    assert "automatically generated" in uploads.there, "a model that is none of ours has transformers' card"
    push(tiny_model(), way, tmp_path / "again")
    assert "import landmark_cli" in uploads.sent[CARD].decode()


def test_the_card_of_what_a_model_was_made_of_is_not_its_own(uploads, tmp_path):
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n# Another model\n")
    model = tiny_model()
    model.name_or_path = str(tmp_path)
    model.push_to_hub("me/mine")
    assert "import landmark_cli" in uploads.sent[CARD].decode()
