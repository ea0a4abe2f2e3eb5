"""Tokenizers of the transformers library: opened, asked and given new tokens in one way, by whoever uses them.

A tokenizer directory keeps what somebody once set: to cut or pad every text, to put tokens around it, to leave out
merges at random. That is no part of a text. Here a document is encoded whole and by itself (`text_ids`), a prompt
whole and behind what begins a text (`prompt_ids`), and a new token gets an id that its files keep (`add_tokens`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading, reason
from landmark_cli.model_files import check_directory, opening

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerBase

LANDMARK_TOKEN = "<landmark>"

# Text of many kinds: tokenizers that give it the same ids are taken to give every text the same ids.
PROBE = (
    'It was the best of times, it was the worst of times; 1859\'s "Tale" cost £12.50.\n\n'
    "\tdef f(x):\n        return x**2  # naïve\n$\\int_0^1 \\mathcal{O}_X$ — Größe, Москва, 東京, 🙂 end"
)
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# What a tokenizer's directory may tell transformers' own call, said anew at every call.
WHOLE = {"truncation": False, "padding": False, "verbose": False}


def open_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer directory or hub id as `AutoTokenizer` opens it, but for what is stored in it about cutting texts,
    padding them and leaving out merges at random.

    trust_remote_code: whether Python code that comes with it may run. Raises LandmarkError where there is no tokenizer,
    it is damaged, or its directory names files outside of itself.
    """
    from transformers import AutoTokenizer

    if os.path.isdir(path):
        check_directory(Path(path))
    with opening(path, "the tokenizer", trust_remote_code) as code:
        tokenizer = AutoTokenizer.from_pretrained(path, **code)
        # What is wrong with a tokenizer may show only when it is used.
        tokenizer("a", **WHOLE)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
    return tokenizer


def decodes_by_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer decodes as its backend of the tokenizers library does, with no Python of its own."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    plain = (PreTrainedTokenizerBase.decode, PreTrainedTokenizerFast._decode)
    return (type(tokenizer).decode, getattr(type(tokenizer), "_decode", None)) == plain


def encoding_by(name: str) -> AbstractContextManager[None]:
    """Stand around a library's call that encodes text by the tokenizer of this name: what is wrong with a tokenizer may
    show only in some text, such as an expression that would try a word in every way there is. Raises LandmarkError."""
    return reading(name, "the tokenizer")


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, reads_special: bool = False) -> list[int]:
    """The ids of a document: all of the text, nothing around it; a special token that the text spells is text like any
    other, unless it is to be read."""
    with encoding_by(tokenizer.name_or_path):
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not reads_special, **WHOLE)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool = True) -> list[int]:
    """The ids of a text that a model is to go on from; none for an empty text if nothing begins one.

    Special tokens that the text spells are read as such. What the tokenizer puts in front of a text by itself stands
    there once, whether or not the text (a chat template's, say) spells it too. What it puts behind a text, such as an
    end of text, is left out: the model goes on there. begins: False for a text that goes on from another one, in front
    of which nothing is put.
    """
    return prompts_ids(tokenizer, [text], begins)[0]


def prompts_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], begins: bool = True) -> list[list[int]]:
    """The ids of each of several texts, as `prompt_ids` gives them; the tokenizers library works on them side by
    side."""
    begin = begin_ids(tokenizer)
    with encoding_by(tokenizer.name_or_path):
        rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=False, **WHOLE)["input_ids"]
    found = []
    for ids in rows:
        start = 0
        while begin and ids[start : start + len(begin)] == begin:
            start += len(begin)
        found.append([*begin, *ids[start:]] if begins else ids[start:])
    return found


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts in front of every text by itself, such as a begin of text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, **WHOLE)
    return encoded["input_ids"][: encoded["special_tokens_mask"].index(0)]


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of any token. `len(tokenizer)` counts tokens, which is less where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1)


def add_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], behind: int = -1) -> list[int]:
    """Give a tokenizer the special tokens that it has not yet, in place, and return the ids of those that are new.

    Their ids come one after the other behind all ids of the tokenizer and behind `behind`, now and whenever its files
    are read. Raises LandmarkError for a kind of tokenizer that cannot have these ids.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = [name for name in names if name not in vocabulary]
    first = max(largest_id(tokenizer), behind) + 1
    ids = {name: first + place for place, name in enumerate(new)}
    tokens = [AddedToken(name, special=True, normalized=False) for name in new]
    if new and first != len(vocabulary):
        _name_ids(tokenizer, ids, tokens)
    tokenizer.add_tokens(tokens, special_tokens=True)
    got = {name: tokenizer.convert_tokens_to_ids(name) for name in new}
    if got != ids:
        raise LandmarkError(
            f"the tokenizer of {tokenizer.name_or_path} has gaps between its ids and cannot be given new ones behind "
            f"them ({_unlike(ids, got)}); give the model a tokenizer without gaps, or one of another kind"
        )
    return list(ids.values())


def pad_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer pad as whoever generates wants it, now and whenever its files are read, in place."""
    tokenizer.padding_side = "left"
    # Only what a tokenizer was opened with is saved.
    tokenizer.init_kwargs["padding_side"] = "left"


def _name_ids(tokenizer: PreTrainedTokenizerBase, ids: dict[str, int], tokens: list[Any]) -> None:
    """Have tokens with these ids in the vocabulary itself, and those that were added before.

    An added token's own id is not kept in files: whoever reads them gives ids anew, by counting tokens. With gaps that
    is another id, or one that is taken. An id in the vocabulary is kept.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokenizer.added_tokens_decoder = dict(zip(ids.values(), tokens, strict=True))
        return
    model = backend.model
    state = json.loads(model.__getstate__())
    # A vocabulary that is a list, not a dictionary, has no gaps.
    if isinstance(state["vocab"], dict):
        state["vocab"] |= tokenizer.get_added_vocab() | ids
        model.__setstate__(json.dumps(state).encode())
        backend.model = model


def check_read_back(
    save: Callable[[str], Any],
    name: str,
    encode: Callable[[str], Sequence[int]],
    special: dict[str, int],
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write a tokenizer somewhere and read it again, before work that needs the tokenizer to come back the same.

    save: writes the directory it is given. name: what the user calls the tokenizer. encode: text -> ids, as now.
    special: ids of tokens, by token ("<landmark>") or by role ("eos_token"), as now. trust_remote_code: whether Python
    code that came with it may run.

    Raises LandmarkError where the tokenizer cannot be written or read, or comes back with other ids.
    """
    with TemporaryDirectory(prefix="landmark-tokenizer-") as directory:
        try:
            save(directory)
            again = open_tokenizer(directory, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise LandmarkError(
                f"the tokenizer of {name} cannot be saved and opened again, which the finished model needs: "
                f"{reason(error)}"
            ) from error
    vocabulary = again.get_vocab()
    found = {token: vocabulary.get(getattr(again, token) if token in ROLES else token) for token in special}
    changed = _unlike(special, found)
    # Text that spells the landmark token is text like any other.
    for text in (PROBE, LANDMARK_TOKEN):
        ids = text_ids(again, text)
        if ids != list(encode(text)):
            changed = changed or f"the text {text[:24]!r} has other ids"
        elif special.get(LANDMARK_TOKEN) in ids:
            changed = changed or f"the text {LANDMARK_TOKEN!r} is read as the token of that name"
    if changed:
        raise LandmarkError(
            f"the tokenizer of {name} does not come back the same when it is saved and opened again ({changed}), "
            "so the finished model would be of no use; give the model a tokenizer.json whose ids have no gaps"
        )


def special_ids(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> dict[str, int]:
    """The ids of these tokens, and of those that have a role ("eos_token")."""
    vocabulary = tokenizer.get_vocab()
    roles = {role: vocabulary[getattr(tokenizer, role)] for role in ROLES if getattr(tokenizer, role) in vocabulary}
    return {token: vocabulary[token] for token in tokens} | roles


def _unlike(expected: dict[str, int], found: dict[str, int | None]) -> str:
    """The first of the expected ids that was not found, in words; nothing where all were."""
    return next((f"{token} is {found[token]}, not {id}" for token, id in expected.items() if found[token] != id), "")
