"""Corpora for tests: files to write, and the documents that come of them."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import zstandard

from landmark_cli.data.documents import BadText


def write(path, content):
    """A file and the folders that it lies in; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents_in(token_file):
    """The ids of an opened token file's documents, each without its end-of-text token."""
    ends = np.flatnonzero(token_file.tokens == token_file.metadata.eot_id)
    return [part[bool(i) :].tolist() for i, part in enumerate(np.split(token_file.tokens, ends))][:-1]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def packed(ending, data):
    """Data as a file with this ending holds them: .gz and .zst in two parts, one behind the other."""
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}.get(
        "." + ending.rpartition(".")[2]
    )
    middle = len(data) // 2
    return data if pack is None else pack(data[:middle]) + pack(data[middle:])


def write_parquet(path, rows, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, **settings)
    return path


def taken(corpus_or_documents, limit=1 << 20):
    """The texts of documents, and the BadTexts in the place of others, in order."""
    documents = getattr(corpus_or_documents, "documents", None)
    documents = [document for _, document in documents()] if documents else corpus_or_documents
    texts, bad = [], []
    for document in documents:
        try:
            texts.append(b"".join(document.pieces(limit)).decode())
        except BadText as error:
            bad.append(error)
    return texts, bad
