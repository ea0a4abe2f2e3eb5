"""Damage to valid files, from a seed: what disks, cut downloads, editors, other programs and strangers make of them.

Every function takes the random numbers and what is there, and gives what stands there instead. Most changes are small:
a file that is wrong in one place gets deepest into its reader.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Damage = Callable[[random.Random, bytes], bytes]

# What stands where something else was expected.
ODD_VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 2**31, 2**63 - 1, 2**63, 10**30, -(10**18), "", "x", "0",
    "nan", "../../etc/passwd", "/dev/zero", "\ud800", "\x00", "a" * 5000, [], {}, [[]], [None], {"": None},
    float("nan"), float("inf"), [1, 2, 3], ["a", "b"], {"a": 1}, "true", "float32", "\u202e", "gpt2", 16_000_000,
)  # fmt: skip
ODD_BYTES = (b"\x00", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"{", b"}", b"[", b'"', b"\\", b"\xc3\x28", b"PK")
DEPTHS = (70, 1000, 100_000)


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Bytes with one to three places changed, or cut, or spliced."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = chance.choice(BYTE_CHANGES)(chance, data)
    return data


def flip_bit(chance: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut_short(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def cut_out(chance: random.Random, data: bytes) -> bytes:
    start, stop = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[min(stop, start + chance.choice((1, 8, 4096))) :]


def repeat(chance: random.Random, data: bytes) -> bytes:
    start, stop = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:stop] + data[start:]


def splice(chance: random.Random, data: bytes) -> bytes:
    """A piece of the same file somewhere else in it."""
    if len(data) < 2:
        return data
    start, stop = sorted(chance.randrange(len(data)) for _ in range(2))
    place = chance.randrange(len(data))
    return data[:place] + data[start : min(stop, start + 64)] + data[place:]


def insert(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.choice(ODD_BYTES) * chance.choice((1, 1, 4, 500)) + data[place:]


def zeros(chance: random.Random, data: bytes) -> bytes:
    """A stretch of zeros, as a file has that was never flushed."""
    start = chance.randrange(len(data) + 1)
    length = min(chance.choice((1, 16, 512, 4096)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


BYTE_CHANGES = (flip_bit, flip_bit, flip_bit, cut_short, cut_out, repeat, splice, insert, zeros)


def damaged_json(chance: random.Random, data: bytes) -> bytes:
    """JSON text: mostly still JSON that says something else, at times no JSON any more."""
    if chance.random() < 0.25:
        return damaged(chance, data)
    try:
        content = json.loads(data)
    except ValueError:
        return damaged(chance, data)
    for _ in range(chance.choice((1, 1, 1, 2))):
        content = changed_value(chance, content)
    text = json.dumps(content, indent=chance.choice((None, 2))).encode()
    return nested(chance, text) if chance.random() < 0.03 else text


def changed_value(chance: random.Random, content: Any) -> Any:
    """Parsed JSON or YAML with one place of it changed."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    if not places:
        return chance.choice(ODD_VALUES)
    holder, key = chance.choice(places)
    kind = chance.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, its_key = chance.choice(places)
        holder[key] = copy.deepcopy(other[its_key])
    elif kind == 2 and isinstance(holder, dict):
        holder[chance.choice((f"{key}_", "", key.upper(), "__proto__"))] = holder.pop(key)
    elif kind == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        number = holder[key]
        holder[key] = chance.choice((-number, number + 1, number * 1000, number / 3, str(number), [number], number - 1))
    elif kind == 4 and isinstance(holder[key], str):
        holder[key] = damaged(chance, holder[key].encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    elif kind == 5 and isinstance(holder[key], (list, dict)):
        holder[key] = [holder[key]] if chance.random() < 0.5 else list(holder[key]) * 3
    else:
        holder[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return content


def _places(content: Any):
    """Every (container, key) of parsed JSON."""
    waiting = [content]
    while waiting:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, value in items:
            yield holder, key
            waiting.append(value)


def nested(chance: random.Random, text: bytes) -> bytes:
    """JSON deep inside lists or objects."""
    depth = chance.choice(DEPTHS)
    return b'{"a":' * depth + text + b"}" * depth if chance.random() < 0.5 else b"[" * depth + text + b"]" * depth


def damaged_lines(chance: random.Random, data: bytes) -> bytes:
    """JSON lines: one line damaged, doubled, gone or out of order."""
    lines = data.splitlines()
    if not lines or chance.random() < 0.15:
        return damaged(chance, data)
    place = chance.randrange(len(lines))
    kind = chance.randrange(6)
    if kind < 3:
        lines[place] = damaged_json(chance, lines[place]).replace(b"\n", b" ")
    elif kind == 3:
        lines.insert(chance.randrange(len(lines)), lines[place])
    elif kind == 4:
        lines[place] = chance.choice((b"", b"null", b"[]", b"{}", b"1", b'"a"', b"\xff", b"{" * 40, b"NaN"))
    else:
        del lines[place]
    return b"\n".join(lines) + b"\n"


def damaged_yaml(chance: random.Random, data: bytes) -> bytes:
    """YAML: another structure, or the text with what YAML alone can say: tags, anchors, merges, other documents."""
    import yaml

    kind = chance.randrange(4)
    if kind == 0:
        return damaged(chance, data)
    if kind == 1:
        lines = data.splitlines()
        lines.insert(chance.randrange(len(lines) + 1), chance.choice(YAML_LINES))
        return b"\n".join(lines) + b"\n"
    content = changed_value(chance, yaml.safe_load(data))
    try:
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeError):
        return json.dumps(content).encode()


YAML_LINES = (
    b"? [a, b]", b"<<: {steps: 3}", b"a: &a [*a]", b"a: &a {b: *a}", b"x: !!python/object/apply:os.getcwd []",
    b"x: !!binary aGVsbG8=", b"--- \nsteps: 1", b"...", b"\tsteps: 1", b"steps: 0x10", b"steps: 1_000", b"lr: .inf",
    b"lr: .nan", b"x: 2001-12-14t21:59:43.10-05:00", b"%YAML 9.9", b"@x", b"- a", b"{: }", b"rows: 3", b"? ? ? ?",
    b"x: " + b"[" * 3000, b"x: " + b"{a: " * 300, b"roles: ~", b"x: !!set {a, b}", b"x: !!omap [a: 1]", b"1: 2",
    b"x: \"\\ud800\"", b"title: [1, 2]", b"study: perplexity", b"command: train", b"null: 1", b"true: 1",
)  # fmt: skip


def damaged_safetensors(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file: its header changed as JSON, with a fitting length or not, or any byte of it."""
    length = int.from_bytes(data[:8], "little")
    kind = chance.randrange(4)
    if kind == 0 or length > len(data) - 8:
        return damaged(chance, data)
    header, tensors = data[8 : 8 + length], data[8 + length :]
    if kind == 1:
        claimed = chance.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + header + tensors
    header = damaged_json(chance, header)
    return len(header).to_bytes(8, "little") + header + (tensors if kind == 2 else cut_short(chance, tensors))


def damaged_zip(chance: random.Random, data: bytes) -> bytes:
    """What torch.save wrote: the pickle in it damaged, an entry gone or another's, or any byte of the whole."""
    if chance.random() < 0.4:
        return damaged(chance, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return damaged(chance, data)
    names = list(entries)
    pickles = [name for name in names if name.endswith(".pkl")]
    name = chance.choice(pickles if pickles and chance.random() < 0.6 else names)
    kind = chance.randrange(5)
    if kind == 0:
        del entries[name]
    elif kind == 1:
        entries[name] = entries[chance.choice(names)]
    else:
        entries[name] = damaged(chance, entries[name])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return written.getvalue()


def damaged_inside_gzip(chance: random.Random, data: bytes) -> bytes:
    """A gzip file that is damaged, or whole with damaged lines in it."""
    if chance.random() < 0.6:
        return damaged(chance, data)
    return gzip.compress(damaged_lines(chance, gzip.decompress(data)), 1)


def damaged_inside_zstandard(chance: random.Random, data: bytes) -> bytes:
    """The same for zstandard."""
    import zstandard

    if chance.random() < 0.6:
        return damaged(chance, data)
    lines = zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 24)
    return zstandard.ZstdCompressor().compress(damaged_lines(chance, lines))


def damaged_parquet(chance: random.Random, data: bytes) -> bytes:
    """A damaged parquet file, or a whole one whose columns are of other types."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if chance.random() < 0.85:
        return damaged(chance, data)
    columns = (
        [1, 2], [None, None], [["a"], []], [{"a": 1}, None], [b"\xff\xfe", b"ok"], ["a", None], [1.5, 2.5], [],
        [True, False], ["\x00", "a" * 100_000],
    )  # fmt: skip
    table = pa.table({chance.choice(("text", "Text", "")): pa.array(chance.choice(columns))})
    written = io.BytesIO()
    parquet.write_table(table, written, compression=chance.choice(("snappy", "zstd", "gzip", "none")))
    return written.getvalue()


JINJA = (
    b"{{ messages }}", b"{% for i in range(3) %}x{% endfor %}", b"{{ 1/0 }}", b"{{ ''.__class__ }}", b"{% raise %}",
    b"{{ messages[0].role.x.y }}", b"{{ raise_exception('no') }}", b"{% set x = messages %}", b"{{ bos_token * 9 }}",
    b"{% include '/etc/passwd' %}", b"{% import 'os' as os %}", b"{{ cycler.__init__ }}", b"{% macro a() %}{{ a() }}",
    b"{% endmacro %}{{ a() }}", b"{% if %}", b"{%", b"{{", b"{#", b"{{ [] | first }}", b"{{ messages | tojson }}",
    b"{{ 'x' * 100000 }}", b"{{ undefined_thing.a }}", b"{{ namespace(a=1) }}", b"{{ strftime_now('%Y') }}",
    b"{{ 9 ** 99999 }}", b"{{ '%999999d' % 1 }}", b"{{ range(1000000) | list | length }}",
)  # fmt: skip


def damaged_template(chance: random.Random, data: bytes) -> bytes:
    """A chat template with other statements in it, or pieces of it gone."""
    if chance.random() < 0.5:
        return damaged(chance, data)
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.choice(JINJA) + data[place:]
