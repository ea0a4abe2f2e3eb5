"""Token files of letters: a tokenizer whose ids are bytes, and what is done to its files."""

import os

import numpy as np

from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter


class Letters:
    """A tokenizer whose ids are bytes."""

    name = "letters"
    vocab_size = 257
    eot_id = 256
    fingerprint = "abc"


class ManyLetters(Letters):
    vocab_size = 70_000
    eot_id = 69_999


def write(path, documents, tokenizer=Letters, **settings):
    with TokenFileWriter(path, tokenizer, source="a test", **settings) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.uint32), text_bytes=len(document))
    return TokenFile.open(path)


def flip_a_byte(path, at=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    # A coarse clock of the file system could hide so quick a change.
    os.utime(path, ns=(1, 1))
