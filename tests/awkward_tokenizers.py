"""Tokenizers of the transformers library, a token a byte, whose directories hold what people's do."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Begin of text, end of text, then the bytes.
BEGIN, END, BYTES = 0, 1, 2
LARGEST_BYTE = BYTES + 255
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def byte_tokenizer(
    *, adds: str = "$A", cut: int | None = None, dropout: float | None = None, ids: dict[str, int] | None = None, **more
) -> PreTrainedTokenizerFast:
    """`<s>`, `</s>` and a token for each byte.

    adds: what it puts around a text by itself, as a template of the tokenizers library ("<s> $A </s>"). cut: texts are
    truncated to so many tokens and padded on the left. dropout: of merges. ids: further special tokens of the
    vocabulary with their ids, gaps left. more: as PreTrainedTokenizerFast takes it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(["<s>", "</s>", *alphabet])} | (ids or {})
    merges = []
    if dropout is not None:
        merges = [("t", "h"), ("th", "e")]
        vocabulary |= {"th": len(vocabulary), "the": len(vocabulary) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, dropout=dropout))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *(ids or {})])
    special = [("<s>", BEGIN), ("</s>", END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special)
    if cut is not None:
        tokenizer.enable_truncation(cut)
        tokenizer.enable_padding(pad_id=END, pad_token="</s>", direction="left", pad_to_multiple_of=2 * cut)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | more
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **roles)


def byte_ids(text: str) -> list[int]:
    """What every `byte_tokenizer` makes of a text, if it has no merges."""
    places = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), BYTES)}
    (pieces,) = ["".join(piece for piece, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(text))]
    return [places[character] for character in pieces]
