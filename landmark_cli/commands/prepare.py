"""`landmark prepare`: documents -> token files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from landmark_cli.commands.models import CodeOptions
from landmark_cli.commands.task_kinds import KINDS_HELP, TaskKind
from landmark_cli.console import info, quantity, results
from landmark_cli.errors import UsageError
from landmark_cli.interrupts import keeping
from landmark_cli.options import LARGEST_SEED, LONGEST, check_outputs, option

if TYPE_CHECKING:
    from landmark_cli.data.chats import Chats
    from landmark_cli.data.corpora import Corpus
    from landmark_cli.data.text_tokenizer import TextTokenizer

MADE = "Pass keys and tasks"
MADE_DOCUMENTS = 2000
SOURCE_OPTIONS = ("source", "revision", "subset", "text_field")
TASK_OPTIONS = dict.fromkeys(("haystack", "absent", "kinds"), "it is for tasks")
MADE_OPTIONS = dict.fromkeys(("shortest", "longest", "seed"), "it is for passkey and tasks") | TASK_OPTIONS
# The options that change nothing, by the corpus, and why.
CHAT_OPTIONS = {"chat": "it is for text"}
IDLE = {
    "text": MADE_OPTIONS,
    "sample": MADE_OPTIONS
    | CHAT_OPTIONS
    | dict.fromkeys(SOURCE_OPTIONS, "the sample is part of the program; for your own files, `landmark prepare text`"),
    "passkey": TASK_OPTIONS | CHAT_OPTIONS | dict.fromkeys(SOURCE_OPTIONS, "passkey makes its documents itself"),
    "tasks": CHAT_OPTIONS
    | dict.fromkeys(("source", "revision", "subset"), "tasks makes its documents itself, of --haystack"),
}


@dataclass
class PrepareOptions(CodeOptions):
    """Turn text into token files that training and evaluation read.

    Without options: six novels of Jane Austen that are part of this program,
    Persuasion held out for validation, into data/sample.

    pg19, arxiv-math (the arXiv papers of the proof-pile) and redpajama (the 1T
    sample) come from --source or from their copy on the Hugging Face hub. text
    is any files or folders of yours: .txt, .md, .tex, .parquet, and .jsonl, also
    .jsonl.gz or .jsonl.zst. passkey makes documents that hide a number in filler
    text and ask for it, tasks such that hide facts of many kinds in prose and ask
    for some of them in many ways; both are to be mixed into training.

    A folder has splits where all its files lie in train/, validation/ or test/,
    or have the names that such files have on the hub (train-00000-of-00002.parquet,
    train.jsonl). Everything that is left out is counted and named.

    An interrupted prepare goes on where it was when the same command is run again.
    """

    corpus: Literal["sample", "pg19", "arxiv-math", "redpajama", "text", "passkey", "tasks"] = option(
        "sample", positional=True, help="The corpus: sample, pg19, arxiv-math, redpajama, text, passkey or tasks."
    )
    source: list[str] | None = option(
        None,
        help="Where the corpus is: a file or folder (repeatable), or a hub id. [default: the hub id of a known copy]",
    )
    output: Path | None = option(None, saved=False, help="Where the token files go. [default: data/CORPUS]")
    tokenizer: str = option(
        "gpt2", help="The tokenizer: gpt2, or the directory or hub id of any tokenizer of transformers."
    )
    validation_share: float = option(
        0.01,
        min=0,
        max=0.5,
        help="Share of the documents (of sample: of its novels) held out where the corpus has no validation split.",
    )
    max_documents: int | None = option(
        None,
        min=1,
        help="Read at most this many documents of each split; of passkey and tasks, make this many. "
        "[default: all; 2000]",
    )
    text_field: str = option(
        "text",
        help="The field or column that holds the text of .jsonl and .parquet; of chats, that of "
        "their messages, which is messages where this is not given.",
    )
    chat: bool = option(
        False,
        help="Read chats: .jsonl with messages of a role and a content, written by the tokenizer's chat template. What "
        "the assistant says is marked as answers.",
    )
    revision: str | None = option(None, help="Branch, tag or commit of a corpus on the hub.")
    subset: str | None = option(None, help="Name of the configuration of a corpus on the hub.")
    on_bad_text: Literal["stop", "skip"] = option(
        "stop",
        help="What to do about a document that is not UTF-8 text or not JSON, and about the rest of a damaged file.",
    )
    shortest: int = option(256, panel=MADE, min=1, max=LONGEST, help="Tokens of the shortest document, about.")
    longest: int = option(4096, panel=MADE, min=1, max=LONGEST, help="Tokens of the longest document, about.")
    seed: int = option(0, panel=MADE, min=0, max=LARGEST_SEED, help="Seed of all that is drawn.")
    haystack: list[str] | None = option(
        None,
        panel=MADE,
        help="Text that tasks are hidden in: a file or folder (repeatable). [default: the sample's novels, without "
        "Persuasion]",
    )
    absent: float = option(
        0.1,
        panel=MADE,
        min=0,
        max=1,
        help="Share of the questions for single facts that ask for what the text does not hold.",
    )
    kinds: list[TaskKind] | None = option(
        None,
        panel=MADE,
        help=f"{KINDS_HELP} [default: look_up in 3 of 10 documents, transcription in 2, and together, all_values, "
        "chain, whole_chain and quotation in 1 each]",
    )
    json: Path | None = option(
        None, saved=False, is_output=True, help="Write the result to this file too; - for standard output."
    )


def run(options: PrepareOptions) -> Path:
    """Prepare a corpus and say what came of it. Returns its directory.

    Raises UsageError for options that contradict each other, LandmarkError for what is wrong with source or output.
    """
    from landmark_cli.data.merge import Process
    from landmark_cli.data.prepare import prepare
    from landmark_cli.data.tokenizers import load_tokenizer

    check_options(options)
    check_outputs(options)
    output = options.output or Path("data") / options.corpus
    tokenizer = load_tokenizer(
        options.tokenizer, trust_remote_code=options.trust_remote_code, reads_special=options.chat
    )
    corpus = find_corpus(options, tokenizer)
    info(f"{options.corpus}: {corpus.source} -> {output} (tokenizer {tokenizer.name})")
    process = Process.from_environment()
    with keeping(partial(process.place_in, output)):
        written = prepare(corpus, tokenizer, output, skip_bad_text=options.on_bad_text == "skip", process=process)
    if written:
        rows = [
            (str(output / f"{split}.bin"), m.documents, m.tokens, quantity(m.text_bytes, "B"))
            for split, m in written.items()
        ]
        results(
            ("file", "documents", "tokens", "text"),
            rows,
            data={split: dataclasses.asdict(metadata) for split, metadata in written.items()},
            json_target=options.json,
        )
    return output


def find_corpus(options: PrepareOptions, tokenizer: TextTokenizer) -> Corpus:
    """The documents that the options name; those of passkey and tasks are made to lengths that the tokenizer
    measures."""
    from landmark_cli.data.corpora import open_corpus
    from landmark_cli.data.passkey import passkey_corpus

    made = {
        "documents": options.max_documents or MADE_DOCUMENTS,
        "shortest": options.shortest,
        "longest": options.longest,
        "validation_share": options.validation_share,
        "seed": options.seed,
    }
    if options.corpus == "passkey":
        return passkey_corpus(tokenizer, **made)
    if options.corpus == "tasks":
        from landmark_cli.data.tasks.corpus import tasks_corpus

        return tasks_corpus(
            tokenizer,
            haystack=options.haystack,
            text_field=options.text_field,
            skip_bad_text=options.on_bad_text == "skip",
            absent=options.absent,
            kinds=options.kinds,
            **made,
        )
    corpus = open_corpus(
        options.corpus,
        options.source,
        revision=options.revision,
        subset=options.subset,
        text_field=options.text_field,
        validation_share=options.validation_share,
        max_documents=options.max_documents,
        chats=find_chats(options, tokenizer) if options.chat else None,
    )
    given = given_options(options)
    if "text_field" in given and not corpus.has_fields:
        raise UsageError(f"--text-field is for .jsonl and .parquet, and {corpus.source} is plain text")
    if "validation_share" in given and corpus.has_validation:
        raise UsageError(f"{corpus.source} has a validation split of its own: leave --validation-share out")
    return corpus


def find_chats(options: PrepareOptions, tokenizer: TextTokenizer) -> Chats:
    """What makes documents of chats. Raises UsageError where the tokenizer has no chat template."""
    from landmark_cli.data.chats import MESSAGES, Chats
    from landmark_cli.inference.chat import ChatTemplate

    opened = tokenizer.as_transformers(landmark=False)
    if not opened.chat_template:
        raise UsageError(
            f"the tokenizer {tokenizer.name} has no chat template: --chat takes the --tokenizer of a model that chats"
        )
    field = options.text_field if "text_field" in given_options(options) else MESSAGES
    template = ChatTemplate(opened)
    return Chats(template.render, template.close, str(opened.chat_template), field)


def check_options(options: PrepareOptions) -> None:
    """UsageError where an option would change nothing, since the corpus has no use for it."""
    idle = IDLE.get(options.corpus, MADE_OPTIONS | CHAT_OPTIONS)
    if options.corpus == "tasks" and not options.haystack:
        idle = idle | {"text_field": "it is for --haystack"}
    for name in given_options(options):
        if name in idle:
            raise UsageError(f"--{name.replace('_', '-')} means nothing for {options.corpus}: {idle[name]}")


def given_options(options: PrepareOptions) -> list[str]:
    """The names of the options that are not at their defaults."""
    return [
        field.name
        for field in dataclasses.fields(options)
        if field.default is not dataclasses.MISSING and getattr(options, field.name) != field.default
    ]
