"""Whether token files, a tokenizer and a model belong together: every check of that, for all commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN
from landmark_cli.data.text_tokenizer import tokenizer_fingerprint
from landmark_cli.errors import LandmarkError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from landmark_cli.data.token_file import TokenFile


def check_one_tokenizer(files: Sequence[TokenFile]) -> None:
    """LandmarkError unless the same tokenizer made all of these token files."""
    if len({file.metadata.tokenizer_fingerprint for file in files}) > 1:
        names = ", ".join(f"{file.path} with {file.metadata.tokenizer}" for file in files)
        raise LandmarkError(f"--data: prepared with different tokenizers ({names}); prepare all with one")


def check_documents(files: Sequence[TokenFile]) -> None:
    """LandmarkError where a token file is one document, so that nothing in it says where another one begins."""
    for file in files:
        if file.metadata.documents < 2:
            raise _one_document(file.path)


def check_known_documents(names: Sequence[str | Path]) -> None:
    """What `check_documents` refuses, as far as it can be told before anything is tokenized. names: of corpora, as
    `token_files` takes them."""
    from landmark_cli.data.corpora import known_documents

    for name in names:
        known = known_documents(name)
        if known is not None and known < 2:
            raise _one_document(name)


def _one_document(name: str | Path) -> LandmarkError:
    return LandmarkError(
        f"--mask-documents: {name} has no ends of documents between its tokens, it is one document: leave "
        "--mask-documents out, or prepare the corpus from its single documents"
    )


def check_token_files(
    files: Sequence[TokenFile], encode: Callable[[str], Sequence[int]], vocab_size: int, whose: str
) -> None:
    """Make sure that the ids in token files mean to a model what they meant to the tokenizer that made them.

    encode: text -> ids, by the model's tokenizer. vocab_size: the ids that the model knows are below it. whose: what
    the user calls the model.

    Raises:
        LandmarkError: the model's tokenizer reads text in another way, or a file may hold ids that it does not know.
    """
    fingerprint = tokenizer_fingerprint(encode)
    for file in files:
        made_by = file.metadata
        if made_by.tokenizer_fingerprint != fingerprint:
            raise LandmarkError(
                f"{file.path} was prepared with the tokenizer {made_by.tokenizer}, which is not that of {whose}: "
                "prepare the corpus with the model's own tokenizer (landmark prepare --tokenizer)"
            )
        if made_by.vocab_size > vocab_size:
            raise LandmarkError(
                f"{file.path} may hold ids up to {made_by.vocab_size - 1}, and {whose} knows those below {vocab_size}: "
                "prepare the corpus with the model's own tokenizer (landmark prepare --tokenizer)"
            )


def check_landmark_token(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """LandmarkError where a landmark model's tokenizer has no landmark token, or another id for it."""
    expected, found = config.landmark_token_id, tokenizer.get_vocab().get(LANDMARK_TOKEN)
    if found != expected:
        has = "no landmark token" if found is None else f"{LANDMARK_TOKEN} as token {found}"
        raise LandmarkError(
            f"the tokenizer of {name} has {has}, but the model's landmark is token {expected}; "
            "put the tokenizer files it was saved with beside it"
        )
