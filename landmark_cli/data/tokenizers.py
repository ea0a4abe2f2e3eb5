"""Which tokenizer a name opens: GPT-2's, which is part of this package, or one of transformers."""

from __future__ import annotations

from landmark_cli.data.gpt2_tokenizer import GPT2Tokenizer
from landmark_cli.data.text_tokenizer import TextTokenizer
from landmark_cli.data.transformers_tokenizer import TransformersTokenizer


def load_tokenizer(
    name: str = "gpt2", *, trust_remote_code: bool = False, reads_special: bool = False
) -> TextTokenizer:
    """Open a tokenizer: "gpt2" (needs no network), a transformers tokenizer directory, or a hub id.

    trust_remote_code: whether Python code that comes with it may run. reads_special: whether a special token that a
    text spells is read as such, as in what a chat template writes.

    Raises:
        LandmarkError: there is no such tokenizer, or it has no end-of-text token.
    """
    if name == "gpt2":
        return GPT2Tokenizer()
    return TransformersTokenizer(name, trust_remote_code=trust_remote_code, reads_special=reads_special)
