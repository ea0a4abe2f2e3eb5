"""`landmark prepare`: documents -> token files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from landmark_cli.commands.models import CodeOptions
from landmark_cli.console import info, quantity, results
from landmark_cli.errors import UsageError
from landmark_cli.options import LARGEST_SEED, LONGEST, option

if TYPE_CHECKING:
    from landmark_cli.data.corpora import Corpus
    from landmark_cli.data.tokenizers import TextTokenizer

EXAMPLES = """\
landmark prepare
landmark prepare pg19 --source ~/pg19
landmark prepare pg19
landmark prepare redpajama --source RedPajama-Data-1T-Sample --tokenizer meta-llama/Llama-2-7b-hf
landmark prepare text --source notes/ --source thesis.tex --output data/mine
landmark prepare passkey --longest 8192 --tokenizer meta-llama/Llama-2-7b-hf
accelerate launch --num_processes 8 landmark prepare arxiv-math
"""

PASS_KEYS = "Pass keys"


@dataclass
class PrepareOptions(CodeOptions):
    """Turn text into token files that training and evaluation read.

    Without options: six novels of Jane Austen that are part of this program,
    Persuasion held out for validation, into data/sample.

    pg19, arxiv-math (the arXiv papers of the proof-pile) and redpajama (the 1T
    sample) come from --source or from their copy on the Hugging Face hub. text
    is any files or folders of yours: .txt, .md, .tex, .parquet, and .jsonl, also
    .jsonl.gz or .jsonl.zst. Folders train/, validation/ and test/ make splits.
    passkey makes documents that hide a number in filler text and ask for it, to
    be mixed into training.

    Interrupted, it goes on where it was when the same command is run again.
    """

    corpus: Literal["sample", "pg19", "arxiv-math", "redpajama", "text", "passkey"] = option(
        "sample", positional=True, help="sample, pg19, arxiv-math, redpajama, text or passkey."
    )
    source: list[str] | None = option(
        None, help="A file or folder (repeatable), or the hub id of a copy. [default: the corpus's own copy on the hub]"
    )
    output: Path | None = option(None, saved=False, help="Where the token files go. [default: data/CORPUS]")
    tokenizer: str = option("gpt2", help="gpt2, or the directory or hub id of any tokenizer of transformers.")
    validation_share: float = option(
        0.01, min=0, max=0.5, help="Share of the documents held out where the corpus has no validation split."
    )
    max_documents: int | None = option(
        None,
        min=1,
        help="Read only so many documents of each split; of passkey, make so many. [default: all; 2000]",
    )
    text_field: str = option("text", help="The field or column that holds the text of .jsonl and .parquet.")
    revision: str | None = option(None, help="Of a copy on the hub: branch, tag or commit.")
    subset: str | None = option(None, help="Of a copy on the hub: the name of its configuration.")
    on_bad_text: Literal["stop", "skip"] = option("stop", help="What to do about a document that is not UTF-8.")
    shortest: int = option(256, panel=PASS_KEYS, min=1, max=LONGEST, help="Tokens of the shortest document, about.")
    longest: int = option(4096, panel=PASS_KEYS, min=1, max=LONGEST, help="Tokens of the longest document, about.")
    seed: int = option(0, panel=PASS_KEYS, min=0, max=LARGEST_SEED, help="Of lengths, keys and depths.")
    json: Path | None = option(None, saved=False, help="Write the result to this file too; - for standard output.")


def run(options: PrepareOptions) -> None:
    """Prepare a corpus and say what came of it.

    Raises UsageError for options that contradict each other, LandmarkError for what is wrong with source or output.
    """
    from landmark_cli.data.corpora import SAMPLE_HELD_OUT
    from landmark_cli.data.merge import Process
    from landmark_cli.data.prepare import prepare
    from landmark_cli.data.tokenizers import load_tokenizer

    output = options.output or Path("data") / options.corpus
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    corpus = find_corpus(options, tokenizer)
    info(f"{options.corpus}: {corpus.source} -> {output} (tokenizer {tokenizer.name})")
    if options.corpus == "sample":
        info(f"the novel held out for validation is {SAMPLE_HELD_OUT}")
    written = prepare(
        corpus,
        tokenizer,
        output,
        skip_bad_text=options.on_bad_text == "skip",
        process=Process.from_environment(),
    )
    if written:
        rows = [
            (split, str(output / f"{split}.bin"), m.documents, m.tokens, quantity(m.text_bytes, "B"), m.dtype)
            for split, m in written.items()
        ]
        results(
            ("split", "file", "documents", "tokens", "text", "ids"),
            rows,
            data={split: vars(metadata) for split, metadata in written.items()},
            json_target=options.json,
        )


def find_corpus(options: PrepareOptions, tokenizer: TextTokenizer) -> Corpus:
    """The documents that the options name; those of passkey are made by the tokenizer's measure."""
    from landmark_cli.data.corpora import open_corpus
    from landmark_cli.data.passkey import passkey_corpus

    if options.corpus == "passkey":
        if options.source or options.revision or options.subset:
            raise UsageError("passkey makes its documents itself: --source, --revision and --subset are for others")
        return passkey_corpus(
            tokenizer,
            documents=options.max_documents or 2000,
            shortest=options.shortest,
            longest=options.longest,
            validation_share=options.validation_share,
            seed=options.seed,
        )
    return open_corpus(
        options.corpus,
        options.source,
        revision=options.revision,
        subset=options.subset,
        text_field=options.text_field,
        validation_share=options.validation_share,
        max_documents=options.max_documents,
    )
