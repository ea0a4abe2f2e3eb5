"""The model card beside a model's weights: what somebody who finds the directory has to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from landmark_cli.families import is_ours
from landmark_cli.file_errors import writing
from landmark_cli.file_writing import write_whole
from landmark_cli.softmax import is_joint

CARD = "README.md"
TAG = "landmark-attention"
# What transformers writes into the card of a model that has none on the hub.
GENERATED = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)

WITH_PACKAGE = """\
    import landmark_cli
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{name}")
    tokenizer = AutoTokenizer.from_pretrained("{name}")
    text = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
    print(tokenizer.decode(model.generate(**text, max_new_tokens=100)[0]))
"""

LANDMARKS = """\
It reads text of any length by landmark attention ([arXiv 2305.16300](https://arxiv.org/abs/2305.16300)): text goes in
as chunks, a landmark token stands after every {landmark_freq} tokens of it, and each token chooses the {top_k_blocks}
earlier blocks that it attends to. The landmarks are put in while reading; give plain text. What a token attends to
stands within {trained_length} positions, landmarks included, as in training.
"""
PLAIN = "It was trained on windows of {trained_length} tokens."

UNKNOWN = "transformers does not know the model type `{model_type}` and opens nothing."
ORDINARY = """\
transformers opens it as an ordinary `{model_type}`, without a warning: it then attends to all tokens as no model with
landmarks was trained to, reads no further than its positions, and predicts text less well.
"""
# Of a model whose landmarks only choose blocks.
ORDINARY_JOINT = """\
transformers opens it as an ordinary `{model_type}`, without a warning: it then attends to all tokens, as its layers do
here to all that is read, and reads no further than its positions.
"""


ADAPTERS = """\
The directory holds adapters, which go on top of the base model:

    import landmark_cli

    model, tokenizer = landmark_cli.load("{name}")
    text = tokenizer("It is a truth universally acknowledged", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**text, max_new_tokens=100)[0]))
"""


@dataclass(frozen=True)
class Trained:
    """How a model was made of another one, for its card.

    base: the name of that one, as the user gave it. on_hub: whether that is an id of the hub. adapters: whether the
    directory holds adapters only. command: that made it. facts: what else there is to say, each with its name. figures:
    what was measured of it, in Markdown; empty where nothing was.
    """

    base: str
    on_hub: bool
    adapters: bool
    command: str
    facts: Sequence[tuple[str, str]]
    figures: str = ""


def write_card(model: PreTrainedModel, directory: str | Path, trained: Trained | None = None) -> None:
    """Write a model card into a model's directory, which is made; without `trained`, unless there is one.

    Raises LandmarkError where it cannot be written.
    """
    file = Path(directory) / CARD
    if trained is not None or not file.exists():
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, model_card(model, trained))


def keep_card(model: PreTrainedModel, directory: str | Path, card: str | None = None) -> None:
    """Where a directory that is about to be uploaded has the empty card that transformers makes, put ours in its place:
    `card`, or that of the directory that the model was opened from, or one made anew; with the tags that were asked
    for. A card that somebody wrote is left as it is."""
    from huggingface_hub import ModelCard, ModelCardData

    file = Path(directory) / CARD
    if not file.is_file():
        return
    found = ModelCard.load(file)
    empty = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=GENERATED)
    if found.text.strip() != empty.text.strip():
        return
    kept = ModelCard(card or _card_beside(model) or model_card(model))
    kept.data.tags = list(dict.fromkeys([*(kept.data.tags or []), *(found.data.tags or [])]))
    kept.save(file)


def _card_beside(model: PreTrainedModel) -> str | None:
    """The card of the directory that a model was opened from, if it is one of ours, and not of what it was made of."""
    from huggingface_hub import ModelCard

    file = Path(model.name_or_path) / CARD
    if not model.name_or_path or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    return text if TAG in (ModelCard(text, ignore_metadata_errors=True).data.tags or []) else None


def model_card(model: PreTrainedModel, trained: Trained | None = None) -> str:
    """The card of a landmark model, or of another of this package: how to use it, what it is without the package, and
    how it was made of another one, if it was."""
    config = model.config
    settings = {name: getattr(config, name, None) for name in ("landmark_freq", "top_k_blocks", "trained_length")}
    has_landmarks = settings["landmark_freq"] is not None
    ours = is_ours(config.model_type)
    about = (LANDMARKS if has_landmarks else PLAIN).format(**settings)
    ordinary = ORDINARY_JOINT if is_joint(config) else ORDINARY
    without = (UNKNOWN if ours else ordinary).format(model_type=config.model_type)
    usage = ADAPTERS if trained is not None and trained.adapters else WITH_PACKAGE
    if trained is None:
        title = (
            f"A language model {'with landmark attention' if has_landmarks else 'of the paper on landmark attention'}"
        )
        base = made = ""
    else:
        title = f"{Path(trained.base).name} with landmark attention"
        base = f"base_model: {trained.base}\n" * trained.on_hub
        made = _made(trained)
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- {TAG}
---
# {title}

{about.rstrip()}

Install the package `landmark-cli`, then:

{usage.format(name="PATH")}
or `landmark generate --model PATH --prompt "..."`. PATH is this directory, or its name on the hub.
{made}
## Without the package

{without.rstrip()}
"""


def _made(trained: Trained) -> str:
    """The sections on how a model was made, and what was measured."""
    rows = "\n".join(f"| {name} | {said} |" for name, said in [("base", trained.base), *trained.facts])
    figures = f"\n## Figures\n\n{trained.figures.rstrip()}\n" if trained.figures else ""
    return f"""
## How it was made

    {trained.command}

| | |
|---|---|
{rows}
{figures}"""
